'use strict';
/* The page: fetches the manager's state each second and presents it. While the manager does not answer, the last state
   stays. Names, reasons and log records may contain any text, so they are inserted as text and never as markup. */

const PANIC = 'fewer than half of the backends are healthy, so all stay in rotation';
const PERIOD = 1000; // milliseconds between two updates
const FULL_FETCH = 60; // updates between two fetches of the whole history, because the manager merges old points
const STATES = { active: '●', starting: '◔', spare: '○', draining: '◑', stopped: '■', failed: '✕' };
const NORMAL = { starting: 'launched', spare: 'launched as a spare', active: 'a probe succeeded' }; // without a cause
const REACHED = { true: '✓ clients reach the service', false: '✕ clients do not reach the service' };
const PHASES = {
  starting: 'a new backend becomes ready', draining: 'an old backend drains', waiting: 'waiting after a failed launch',
  rolling_back: 'given up, the earlier backends return',
};
const UNITS = { packets: 'packets/s', connections: 'connections/s', concurrency: 'open connections' };

let points = [], decisions = [], updates = 0, updatedAt = '', newest = { time: 0, at: 0 };
let backends = [], metric = '', replayed = null;
const opened = new Map(); // by name: the backends whose details are open, with their answers of /shares
let seconds = Number(localStorage.getItem('seconds')) || 600;

const $ = (id) => document.getElementById(id);
const digits = (value) => value.toLocaleString('en-GB', { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const number = (value) => (value === null ? '–' : digits(value));
const clock = (time) => new Date(time * 1000).toLocaleTimeString('en-GB');

// Writes only a text that has changed, so that a user's selection is kept.
function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

/* Gives the parent one copy of the template for each item. A copy is reused for the item with the same key, and is not
   moved, so that it keeps the keyboard's focus. */
function list(parent, template, items, fill, key = (item, index) => index) {
  const keys = items.map((item, index) => String(key(item, index)));
  const wanted = new Set(keys), known = new Map();
  for (const child of [...parent.children]) {
    if (wanted.has(child.dataset.key)) known.set(child.dataset.key, child);
    else child.remove();
  }
  items.forEach((item, index) => {
    const child = known.get(keys[index]) || $(item.template || template).content.firstElementChild.cloneNode(true);
    child.dataset.key = keys[index];
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] || null);
    fill(child, item);
  });
}

/* -- the parts of the page ----------------------------------------------------------------------------------------- */

// In each scale-out, too few backends serve until the new ones are ready. That is expected, so it is only a note.
const kindOf = (problem) => (problem.kind === 'too_few_backends' ? 'note' : 'problem');

// The notices at the top: first the manager's problems, then unusual states that are no problem.
function noticesOf(status) {
  const notices = status.problems.map((problem) => [kindOf(problem), 'Problem:', problem.text]);
  const { launches } = status;
  if (launches.retry_in) notices.push(['note', 'Launches wait:', `the next one is in ${digits(launches.retry_in)} s.`]);
  if (status.paused) notices.push(['note', 'Paused.', 'Decisions are recorded, but not carried out.']);
  if (status.rotation_panic.length) notices.push(['note', 'Panic mode:', `${PANIC}.`]);
  if (launches.updating) {
    const all = launches.replaced + launches.to_replace;
    notices.push(['note', 'Updating:', `${launches.replaced} of ${all} backends are replaced.`]);
  }
  return notices;
}

function writeNotices(notices) {
  list($('notices'), 'notice', notices, (element, [kind, title, text]) => {
    element.className = kind;
    write(element.children[0], title);
    write(element.children[1], text);
  });
}

function writeDecision(status) {
  const decision = status.last_decision;
  if (!decision) return;
  write($('verdict'), `${decision.verdict} ${step(decision)}`);
  $('verdict').className = way(decision);
  write($('reason'), decision.reason);
}

/* For screen readers: announces new problems and decisions, not the same ones again every second. */
function announce(status) {
  const decision = status.last_decision, spoken = $('spoken');
  const problems = status.problems.map((problem) => problem.kind);
  const limits = decision ? decision.clamps.map((clamp) => clamp.kind) : [];
  const panic = status.rotation_panic.length > 0, { updating } = status.launches;
  const kinds = [...problems, status.paused, panic, updating, decision?.verdict, ...limits].join();
  if (spoken.dataset.kinds === kinds && (!decision || decision.verdict === 'OK')) return;
  spoken.dataset.kinds = kinds;
  const sentences = status.problems.map((problem) => `${problem.text}.`);
  if (status.paused) sentences.push('Paused.');
  if (panic) sentences.push(`Panic mode: ${PANIC}.`);
  if (updating) sentences.push('An update is in progress.');
  write(spoken, [...sentences, decision?.verdict, decision?.reason].join(' '));
}

function writeFigures(status) {
  const active = status.backends.filter((backend) => backend.state === 'active').length;
  const capacity = status.target * status.current, use = (100 * status.rate) / capacity;
  const newestReport = Math.min(...status.balancers.map((balancer) => balancer.last_seen));
  write($('active'), active);
  write($('desired'), `${status.desired} desired, ${status.min} to ${status.max} allowed`);
  write($('rate'), number(status.rate));
  write($('unit'), UNITS[status.metric]);
  write($('capacity'), number(capacity));
  write($('target'), `${status.current} × ${status.target}`);
  write($('use'), status.rate === null || !capacity ? '–' : `${use.toFixed(0)} %`);
  $('use-bar').value = use || 0;
  write($('balancers'), status.balancers.length);
  write($('report-age'), status.balancers.length ? `last report ${digits(newestReport)} s ago` : 'none has reported');
  write($('project'), status.project);
  document.title = `${active}/${status.desired} ${status.project}`;
}

function writeChecks({ data_path, launches, last_decision, rotation_panic }) {
  const kept = rotation_panic.length ? `rotation: ${PANIC} (${rotation_panic.join(', ')})` : '';
  const limited = last_decision?.panic ? 'scaling: a burst, so no scale-in' : '';
  const replaced = `${launches.replaced} of ${launches.replaced + launches.to_replace} replaced`;
  const phase = PHASES[launches.phase], last = launches.update_given_up ? 'the last one was given up' : 'none';
  write($('self-check'), REACHED[data_path.working] || 'no result yet');
  $('self-check').className = { true: 'good', false: 'bad' }[data_path.working] || '';
  write($('panic'), [kept, limited].filter(Boolean).join('; ') || 'off');
  write($('update'), phase ? `${replaced}: ${phase}` : last);
}

function writeBackend(row, backend) {
  const probe = backend.healthy === false ? backend.why || 'unhealthy' : '';
  const texts = {
    ...backend,
    ip: backend.ip || 'no address',
    state: `${STATES[backend.state]} ${backend.state}`,
    note: [probe, backend.reason].filter(Boolean).join('; '),
    share: `${digits(100 * backend.share)} %`,
    connections_rate: digits(backend.connections_rate),
    packets_rate: digits(backend.packets_rate),
  };
  for (const cell of row.querySelectorAll('[data-field]')) write(cell, texts[cell.dataset.field]);
  row.querySelector('.state').className = `state ${backend.state}`;
  row.querySelector('.share i i').style.width = `${100 * backend.share}%`;
  row.querySelector('button').setAttribute('aria-expanded', opened.has(backend.name));
}

function writeDetail(row, backend) {
  const since = new Date(backend.since * 1000).toLocaleString('en-GB');
  write(row.querySelector('.cause'), `${backend.state} since ${since}: ${backend.reason || NORMAL[backend.state]}`);
  const { times, shares } = opened.get(backend.name);
  const span = times.at(-1) - times[0] || 1, lowest = Math.min(...shares), highest = Math.max(...shares);
  const at = (share, index) => `${(300 * (times[index] - times[0])) / span},${39 - (38 * share) / (highest || 1)}`;
  row.querySelector('polyline').setAttribute('points', shares.map(at).join(' '));
  const [low, high, now] = [lowest, highest, backend.share].map((share) => `${digits(100 * share)} %`);
  const text = `Share in the last ${Math.ceil(span / 60)} min: ${low} to ${high}, now ${now}.`;
  write(row.querySelector('.note'), shares.length ? text : 'No share is recorded yet.');
}

function writeFleet() {
  const rows = [];
  for (const backend of backends) {
    rows.push({ backend, template: 'backend', fill: writeBackend });
    if (opened.has(backend.name)) rows.push({ backend, template: 'detail', fill: writeDetail });
  }
  const key = ({ backend, template }) => `${template} ${backend.name}`;
  list($('fleet'), '', rows, (element, { backend, fill }) => fill(element, backend), key);
}

function writeChanges() {
  list($('changes'), 'change', decisions.slice(-50).reverse(), (row, decision) => {
    write(row.children[0], clock(decision.time));
    write(row.children[1], step(decision));
    row.children[1].className = way(decision);
    write(row.children[2], decision.reason);
  });
}

function writeSettings(settings) {
  list($('settings'), 'setting', Object.entries(settings), (row, [name, value]) => {
    write(row.children[0], name.replaceAll('_', '-'));
    write(row.children[1], String(value) || '–');
  });
  // A field has the value in force until the user changes it.
  for (const field of $('what-if').querySelectorAll('input')) field.defaultValue = settings[field.name];
}

function writeLog(records) {
  // A reader who has scrolled back keeps the position.
  const log = $('log'), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  list(log, 'line', records, (line, record) => {
    write(line, `${clock(record.time)} ${record.level} ${record.text}\n`);
    line.className = record.level;
  });
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/* -- fetching ------------------------------------------------------------------------------------------------------ */

async function get(path) {
  const answer = await fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer.json();
}

/* Fetches the shares of the backends whose details are open, and forgets the backends that are gone. */
async function fetchShares() {
  const names = backends.map((backend) => backend.name);
  for (const name of [...opened.keys()]) {
    const found = await get(`/shares?name=${encodeURIComponent(name)}`);
    if (!names.includes(name)) opened.delete(name);
    else if (opened.has(name)) opened.set(name, found);
  }
  writeFleet();
}

async function refresh() {
  const since = updates % FULL_FETCH && points.length ? points.at(-1).time : 0;
  const [status, past, log] = await Promise.all([
    get('/status'),
    get(`/history?since=${since}`),
    get('/log?lines=100'),
  ]);
  updates += 1;
  points = join(points, past.points);
  decisions = join(decisions, past.decisions);
  if (past.points.length && points.at(-1).time > newest.time) {
    newest = { time: points.at(-1).time, at: performance.now() };
  }
  announce(status);
  writeNotices(noticesOf(status));
  writeDecision(status);
  writeFigures(status);
  writeChecks(status);
  ({ backends, metric } = status);
  await fetchShares();
  writeChanges();
  writeSettings(status.settings);
  writeLog(log);
  updatedAt = new Date().toLocaleTimeString('en-GB');
  write($('pulse'), `updated ${updatedAt}`);
}

// The charts end at the manager's time, because the browser's clock may differ.
function redraw() {
  draw(points, decisions, newest.time + (performance.now() - newest.at) / 1000, seconds);
}

/* -- what if ------------------------------------------------------------------------------------------------------- */

function writeReplay({ times, actual, simulated }, asked) {
  const minutes = times.length ? Math.ceil((times.at(-1) - times[0]) / 60) : 0;
  const figures = (course) => `${course.backend_hours.toFixed(2)} backend-hours, at most ${course.peak} backends, `
    + `${course.changes} changes, at most ${digits(course.highest_load)} ${UNITS[metric]} each`;
  const settings = [...asked].map(([name, value]) => `${name.replaceAll('_', '-')} ${value}`).join(', ');
  const text = `The last ${minutes} min. Actual: ${figures(actual)}. With ${settings}: ${figures(simulated)}.`;
  write($('what-if-result'), times.length ? text : 'No decision is recorded yet.');
  $('what-if-chart').hidden = !times.length;
  if (times.length) drawWhatIf(replayed);
}

/* Writes the manager's refusal next to the field that it is about; '' if there is none. The fields have the manager's
   limits, so if all are valid, it is about the windows' order. */
function writeRefusal(form, text) {
  const refused = text && (form.querySelector(':invalid') || form.elements.panic_window);
  for (const field of form.querySelectorAll('input')) {
    field.setAttribute('aria-invalid', field === refused);
    field.setAttribute('aria-describedby', field === refused ? 'refusal' : '');
  }
  write($('refusal'), text);
  if (refused) refused.closest('label').after($('refusal'));
  if (refused) refused.focus();
}

async function replay(event) {
  event.preventDefault();
  const form = event.target, asked = new URLSearchParams(new FormData(form));
  const answer = await fetch(`/what-if?${asked}`, { cache: 'no-store' });
  writeRefusal(form, answer.ok ? '' : (await answer.text()).trim());
  if (answer.ok) writeReplay(replayed = await answer.json(), asked);
}

async function poll() {
  try {
    await refresh();
    document.body.classList.remove('away');
  } catch (error) {
    const age = updatedAt && ` The page is as of ${updatedAt}.`;
    $('spoken').dataset.kinds = ''; // so that the state is announced after the manager has answered again
    write($('spoken'), 'The manager does not answer.');
    writeNotices([['problem', 'The manager does not answer.', `Retrying each second.${age}`]]);
    document.body.classList.add('away');
    console.debug(error);
  }
  redraw();
  setTimeout(poll, PERIOD);
}

for (const button of $('ranges').children) {
  const press = () => button.setAttribute('aria-pressed', Number(button.dataset.seconds) === seconds);
  addEventListener('range', press);
  button.addEventListener('click', () => {
    seconds = Number(button.dataset.seconds);
    localStorage.setItem('seconds', seconds);
    dispatchEvent(new Event('range'));
  });
}
$('fleet').addEventListener('click', ({ target }) => {
  if (!target.matches('button')) return;
  const name = target.textContent;
  if (!opened.delete(name)) opened.set(name, { times: [], shares: [] });
  fetchShares().catch(console.debug); // the next update tries again
  writeFleet();
});
$('what-if').addEventListener('submit', (event) => {
  replay(event).catch(() => write($('refusal'), 'The manager does not answer.'));
});
addEventListener('range', redraw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  redraw();
  if (replayed?.times.length) drawWhatIf(replayed);
});
dispatchEvent(new Event('range'));
poll();
