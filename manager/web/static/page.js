'use strict';
/* The page: asks the manager each second and shows what it says. It goes on while the manager is away, with what it has.
   Names, reasons and log lines are others' words: they go in as text, never as markup. */

const EVERY = 1000; // milliseconds
const WHOLE = 60; // asks until the whole history is fetched anew, in which the manager has thinned old points
const STATES = { active: '●', starting: '◔', spare: '○', draining: '◑', stopped: '■', failed: '✕' };
const UNITS = { packets: 'packets/s', connections: 'connections/s', concurrency: 'open connections' };

let points = [], decisions = [], asked = 0, answered = '', newest = { time: 0, at: 0 };
let seconds = Number(localStorage.getItem('seconds')) || 600;

const $ = (id) => document.getElementById(id);
const digits = (value) => value.toLocaleString('en-GB', { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const number = (value) => (value === null ? '–' : digits(value));
const clock = (time) => new Date(time * 1000).toLocaleTimeString('en-GB');

function write(element, text) { // only where it differs, so that a selection lasts
  if (element.textContent !== String(text)) element.textContent = text;
}

function list(parent, template, items, fill) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  while (parent.children.length < items.length) parent.append($(template).content.firstElementChild.cloneNode(true));
  items.forEach((item, index) => fill(parent.children[index], item));
}

/* -- what is shown ------------------------------------------------------------------------------------------------- */

function troublesOf(status) {
  const { launches } = status, found = [];
  if (status.paused) found.push(['said', 'Paused.', 'Decisions are made and shown, not carried out.']);
  if (status.engine !== 'ok') found.push(['bad', 'Engine trouble:', `the fleet stays as it is: ${status.engine}`]);
  if (launches.failed) found.push(['bad', 'Launch trouble:', `${launches.failed} in vain, next try in ${digits(launches.retry_in)} s: ${launches.why}`]);
  if (launches.update_given_up) found.push(['bad', 'Update given up:', launches.update_given_up]);
  if (launches.updating) found.push(['said', 'Updating:', 'backends are being replaced one by one.']);
  if (!status.balancers.length) found.push(['said', 'No balancer reports:', 'loads and shares are not known.']);
  return found;
}

function showTroubles(found, decision) {
  speak(found, decision);
  list($('troubles'), 'trouble', found, (element, [kind, title, text]) => {
    element.className = kind;
    write(element.children[0], title);
    write(element.children[1], text);
  });
}

function showDecision(status) {
  const decision = status.last_decision;
  if (!decision) return;
  write($('verdict'), `${decision.verdict} ${step(decision)}`);
  $('verdict').className = way(decision);
  write($('reason'), decision.reason);
}

/* A voice reads what is new, not the same troubles and numbers every second. */
function speak(troubles, decision) {
  const titles = troubles.map(([, title]) => title), spoken = $('spoken');
  const clamps = decision ? decision.clamps.map((clamp) => clamp.kind) : [];
  const kind = [...titles, decision?.verdict, ...clamps].join();
  if (spoken.dataset.kind === kind && (!decision || decision.verdict === 'OK')) return;
  spoken.dataset.kind = kind;
  write(spoken, [...titles, decision?.verdict, decision?.reason].join(' '));
}

function showFigures(status) {
  const active = status.backends.filter((backend) => backend.state === 'active').length;
  const capacity = status.target * status.current, use = (100 * status.rate) / capacity;
  const heard = Math.min(...status.balancers.map((balancer) => balancer.last_seen));
  write($('active'), active);
  write($('wanted'), `${status.desired} wanted, ${status.min} to ${status.max} allowed`);
  write($('rate'), number(status.rate));
  write($('unit'), UNITS[status.metric]);
  write($('capacity'), number(capacity));
  write($('target'), `${status.current} × ${status.target}`);
  write($('use'), status.rate === null || !capacity ? '–' : `${use.toFixed(0)} %`);
  $('meter').value = use || 0;
  write($('balancers'), status.balancers.length);
  write($('heard'), status.balancers.length ? `heard ${digits(heard)} s ago` : 'none reports');
  write($('project'), status.project);
  document.title = `${active}/${status.desired} ${status.project}`;
}

function showBackend(row, backend) {
  const shown = {
    ...backend,
    ip: backend.ip || 'no address',
    state: `${STATES[backend.state]} ${backend.state}`,
    note: backend.reason || backend.why || (backend.healthy === false ? 'found ill' : ''),
    share: `${digits(100 * backend.share)} %`,
    connections_rate: digits(backend.connections_rate),
    packets_rate: digits(backend.packets_rate),
  };
  for (const cell of row.querySelectorAll('[data-field]')) write(cell, shown[cell.dataset.field]);
  row.querySelector('.state').className = `state ${backend.state}`;
  row.querySelector('.share i i').style.width = `${100 * backend.share}%`;
}

function showChanges() {
  list($('changes'), 'change', decisions.slice(-50).reverse(), (row, decision) => {
    write(row.children[0], clock(decision.time));
    write(row.children[1], step(decision));
    row.children[1].className = way(decision);
    write(row.children[2], decision.reason);
  });
}

function showSettings(settings) {
  list($('settings'), 'setting', Object.entries(settings), (row, [name, value]) => {
    write(row.children[0], name.replaceAll('_', '-'));
    write(row.children[1], String(value) || '–');
  });
}

function showLog(text) {
  const log = $('log'), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  list(log, 'line', text.split('\n').slice(0, -1), (line, words) => {
    write(line, `${words}\n`);
    line.className = words.split(' ')[2] || '';
  });
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/* -- asking -------------------------------------------------------------------------------------------------------- */

async function ask(path) {
  const answer = await fetch(path, { cache: 'no-store', signal: AbortSignal.timeout(5000) });
  if (!answer.ok) throw new Error(`${answer.status}`);
  return answer;
}

async function refresh() {
  const since = asked % WHOLE && points.length ? points.at(-1).time : 0;
  const [status, past, log] = await Promise.all([
    ask('/status').then((answer) => answer.json()),
    ask(`/history?since=${since}`).then((answer) => answer.json()),
    ask('/log?lines=100').then((answer) => answer.text()),
  ]);
  asked += 1;
  points = join(points, past.points);
  decisions = join(decisions, past.decisions);
  if (past.points.length && points.at(-1).time > newest.time) newest = { time: points.at(-1).time, at: performance.now() };
  showTroubles(troublesOf(status), status.last_decision);
  showDecision(status);
  showFigures(status);
  list($('fleet'), 'backend', status.backends, showBackend);
  showChanges();
  showSettings(status.settings);
  showLog(log);
  answered = new Date().toLocaleTimeString('en-GB');
  write($('pulse'), `updated ${answered}`);
}

function redraw() {
  draw(points, decisions, newest.time + (performance.now() - newest.at) / 1000, seconds);
}

async function poll() {
  try {
    await refresh();
    document.body.classList.remove('away');
  } catch (error) {
    const left = answered && ` What is shown is from ${answered}.`;
    showTroubles([['bad', 'The manager does not answer.', `Asking again each second.${left}`]]);
    document.body.classList.add('away');
    console.debug(error);
  }
  redraw();
  setTimeout(poll, EVERY);
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
