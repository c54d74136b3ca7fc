'use strict';
/* The page: fetches the manager's state each second and presents it. While the manager does not answer, the last state
   stays. Names, reasons and log records may contain any text, so they are inserted as text and never as markup. */

const PERIOD = 1000; // milliseconds between two updates
const FULL_FETCH = 60; // updates between two fetches of the whole history, because the manager merges old points
const STATES = { active: '●', starting: '◔', spare: '○', draining: '◑', stopped: '■', failed: '✕' };
const UNITS = { packets: 'packets/s', connections: 'connections/s', concurrency: 'open connections' };

let points = [], decisions = [], updates = 0, updatedAt = '', newest = { time: 0, at: 0 };
let seconds = Number(localStorage.getItem('seconds')) || 600;

const $ = (id) => document.getElementById(id);
const digits = (value) => value.toLocaleString('en-GB', { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const number = (value) => (value === null ? '–' : digits(value));
const clock = (time) => new Date(time * 1000).toLocaleTimeString('en-GB');

// Writes only a text that has changed, so that a user's selection is kept.
function write(element, text) {
  if (element.textContent !== String(text)) element.textContent = text;
}

// Gives the parent one copy of the template for each item, and reuses the copies that are there.
function list(parent, template, items, fill) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  while (parent.children.length < items.length) parent.append($(template).content.firstElementChild.cloneNode(true));
  items.forEach((item, index) => fill(parent.children[index], item));
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
  const kinds = [...problems, status.paused, decision?.verdict, ...limits].join();
  if (spoken.dataset.kinds === kinds && (!decision || decision.verdict === 'OK')) return;
  spoken.dataset.kinds = kinds;
  const sentences = status.problems.map((problem) => `${problem.text}.`);
  if (status.paused) sentences.push('Paused.');
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

function writeBackend(row, backend) {
  const texts = {
    ...backend,
    ip: backend.ip || 'no address',
    state: `${STATES[backend.state]} ${backend.state}`,
    note: backend.reason || backend.why || (backend.healthy === false ? 'unhealthy' : ''),
    share: `${digits(100 * backend.share)} %`,
    connections_rate: digits(backend.connections_rate),
    packets_rate: digits(backend.packets_rate),
  };
  for (const cell of row.querySelectorAll('[data-field]')) write(cell, texts[cell.dataset.field]);
  row.querySelector('.state').className = `state ${backend.state}`;
  row.querySelector('.share i i').style.width = `${100 * backend.share}%`;
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
  list($('fleet'), 'backend', status.backends, writeBackend);
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
addEventListener('range', redraw);
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
dispatchEvent(new Event('range'));
poll();
