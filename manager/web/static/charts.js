'use strict';
/* The charts of load and fleet. Plotly draws them; if it cannot be loaded, the rest of the page still works. */

const DAY = 86400; // seconds
const GAP = 125; // seconds without a point that interrupt a line; old points are one a minute

const WAYS = { CREATE_SERVER: 'grow', STOP_SERVER: 'shrink' };
const MARKS = { grow: '▲', shrink: '▼' };

const way = (decision) => WAYS[decision.verdict] || '';
const step = (decision) => `${MARKS[way(decision)] || ''} ${decision.current}→${decision.desired}`.trim();

/* Joins known and new entries. From the time of the first new entry on, the new ones replace the known ones. Older
   entries are kept for a day, also those of an earlier manager. */
function join(known, fresh) {
  if (!fresh.length) return known;
  return [...known.filter((one) => one.time < fresh[0].time && one.time > fresh[0].time - DAY), ...fresh];
}

/* Wraps a text, and escapes it, because Plotly interprets some tags. */
function plain(text, width) {
  const lines = [''];
  for (const word of text.split(' ')) {
    if ((lines.at(-1) + word).length > width) lines.push('');
    lines[lines.length - 1] += `${word} `;
  }
  const escaped = lines.map((line) => line.trim().replaceAll('&', '&amp;').replaceAll('<', '&lt;'));
  return escaped.filter((line) => line).join('<br>');
}

/* One line of a chart. A null after a gap in the data interrupts it. */
function series(points, name, field, line, more) {
  const x = [], y = [];
  points.forEach((point, index) => {
    if (index && point.time - points[index - 1].time > GAP) { x.push(new Date(point.time * 1000 - 1)); y.push(null); }
    x.push(new Date(point.time * 1000));
    y.push(point[field]);
  });
  return { name, x, y, type: 'scatter', mode: 'lines', line, ...more };
}

/* A triangle on the line for each decision that changed the number of backends. */
function marks(points, decisions, field, colour) {
  const width = innerWidth < 700 ? 34 : 60;
  const at = (time) => points.findLast((point) => point.time <= time) || points[0];
  return {
    name: 'decisions', type: 'scatter', mode: 'markers', cliponaxis: false, showlegend: false,
    x: decisions.map((decision) => new Date(decision.time * 1000)),
    y: decisions.map((decision) => at(decision.time)[field]),
    text: decisions.map((decision) => plain(`${step(decision)}  ${decision.reason}`, width)),
    hovertemplate: '%{text}<extra></extra>',
    marker: {
      size: 11,
      symbol: decisions.map((decision) => (way(decision) === 'grow' ? 'triangle-up' : 'triangle-down')),
      color: decisions.map((decision) => colour(way(decision))),
      line: { width: 1.5, color: colour('card') },
    },
  };
}

const LABELS = {
  load: 'Chart of load and capacity over time; the present figures are under Last decision.',
  size: 'Chart of active and desired backends over time; its changes are under Changes.',
};
const SETTINGS = { displayModeBar: false, responsive: true };

/* The colours and the layout of a chart from `start` to `end`, in seconds, in the present colour scheme. */
function look(start, end) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { gridcolor: colour('line'), zeroline: false, fixedrange: true, color: colour('quiet') };
  const layout = {
    margin: { l: 46, r: 14, t: 28, b: 26 }, paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: style.getPropertyValue('font-family') || 'system-ui, sans-serif', size: 12, color: colour('text') },
    legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom' }, dragmode: false, hovermode: 'x unified',
    hoverlabel: {
      bgcolor: colour('card'), bordercolor: colour('line'), font: { color: colour('text') }, align: 'left',
    },
    xaxis: {
      ...axis, type: 'date', tickformat: '%H:%M', hoverformat: '%H:%M:%S',
      range: [new Date(start * 1000), new Date(end * 1000)],
    },
    yaxis: { ...axis, rangemode: 'tozero' },
  };
  const line = { color: colour('rate'), width: 2 };
  const dashed = { color: colour('capacity'), width: 1.5, dash: 'dash', shape: 'hv' };
  const fill = { fill: 'tozeroy', fillcolor: colour('soft') };
  const whole = { ...layout, yaxis: { ...layout.yaxis, tickformat: 'd' } };
  return { colour, layout, whole, line, dashed, fill };
}

/* Draws the last `seconds` before `end`, a time of the manager's clock. */
function draw(points, decisions, end, seconds) {
  if (!window.Plotly || !points.length) return;
  document.querySelector('.empty')?.remove();
  for (const [id, ariaLabel] of Object.entries(LABELS)) {
    Object.assign(document.getElementById(id), { role: 'img', ariaLabel });
  }
  const { colour, layout, whole, line, dashed, fill } = look(end - seconds, end);
  Plotly.react('load', [
    series(points, 'load', 'rate', line, { ...fill, hovertemplate: '%{y:.4~g}' }),
    series(points, 'capacity (target × backends)', 'capacity', dashed, { hovertemplate: '%{y:.4~g}' }),
    marks(points, decisions, 'rate', colour),
  ], layout, SETTINGS);
  Plotly.react('size', [
    series(points, 'active', 'backends', { ...line, shape: 'hv' }, fill),
    series(points, 'desired', 'desired', dashed),
    marks(points, decisions, 'desired', colour),
  ], whole, SETTINGS);
}

/* The actual and the simulated fleet of an answer of /what-if. */
function drawWhatIf({ times, actual, simulated }) {
  if (!window.Plotly) return;
  const { whole, line, dashed } = look(times[0], times.at(-1));
  const points = times.map((time, index) => (
    { time, actual: actual.backends[index], simulated: simulated.backends[index] }));
  Plotly.react('what-if-chart', [
    series(points, 'actual', 'actual', dashed),
    series(points, 'simulated', 'simulated', { ...line, shape: 'hv' }),
  ], whole, SETTINGS);
}
