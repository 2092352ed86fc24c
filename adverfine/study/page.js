// What a page of a study does: draws its charts with Plotly, lets their points be read by keyboard, sorts and filters tables.
'use strict'
const all = selector => [...document.querySelectorAll(selector)]
const held = id => { const o = document.getElementById(id); return o && JSON.parse(o.textContent) }

const unescaped = text => text.replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&')

function themed() {
  const style = getComputedStyle(document.documentElement)
  const [ink, line, paper] = ['--ink', '--line', '--paper'].map(k => style.getPropertyValue(k).trim())
  const changes = {'font.color': ink, 'hoverlabel.bgcolor': paper, 'hoverlabel.bordercolor': ink, 'hoverlabel.font.color': ink}
  for (const axis of ['xaxis', 'yaxis'])
    for (const k of ['gridcolor', 'zerolinecolor', 'linecolor']) changes[`${axis}.${k}`] = line
  for (const axis of ['xaxis', 'yaxis']) changes[`${axis}.automargin`] = true
  return changes
}

function draw(box, figure) {
  const config = {responsive: true, displayModeBar: false, displaylogo: false}
  return Plotly.newPlot(box, figure.data, figure.layout, config).then(() => Plotly.relayout(box, themed()))
}

// Arrow keys go from point to point; the label is shown, and said to screen readers.
function readable(box, said) {
  let at = -1
  const points = () => box.data.flatMap((trace, curve) => trace.visible === false || !trace.hovertext ? [] :
    trace.hovertext.map((text, k) => ({curve, k, text})).filter(o => trace.x[o.k] != null))
  box.addEventListener('keydown', event => {
    const known = points(), n = known.length
    const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: n - 1}[event.key]
    if (event.key === 'Escape') { Plotly.Fx.unhover(box); at = -1 }
    if (to === undefined || !n) return
    event.preventDefault()
    at = (to + n) % n
    const {curve, k, text} = known[at]
    Plotly.Fx.hover(box, [{curveNumber: curve, pointNumber: k}])
    said.textContent = unescaped(`${box.data[curve].name}: ${text.replaceAll('<br>', ', ')}`)
  })
  box.addEventListener('blur', () => { Plotly.Fx.unhover(box); at = -1 })
}

function priced(box, figure, prices, select) {
  const show = () => {
    const price = prices[select.value]
    price.x.forEach((x, k) => { figure.data[k].x = x })
    const front = figure.data[price.x.length]
    front.x = price.front.x
    front.y = price.front.y
    const axis = figure.layout.xaxis = {...figure.layout.xaxis, title: {text: price.title}, type: price.log ? 'log' : 'linear'}
    delete axis.range
    axis.autorange = true
    const visible = (box.data || []).map(o => o.visible)
    visible.forEach((o, k) => { figure.data[k].visible = o })
    Plotly.react(box, figure.data, figure.layout).then(() => Plotly.relayout(box, themed()))
  }
  select.addEventListener('change', show)
  return show
}

function charts() {
  const figures = held('charts')
  if (!figures || !window.Plotly) return
  all('.live').forEach(o => { o.hidden = false })
  const said = document.getElementById('said')
  const boxes = all('.chart')
  const drawn = boxes.map(box => draw(box, figures[box.dataset.chart]).then(() => readable(box, said)))
  const select = document.getElementById('price'), box = document.getElementById('priced')
  if (select) Promise.all(drawn).then(priced(box, figures[box.dataset.chart], held('prices'), select))
  all('.keys input').forEach(input => input.addEventListener('change', () => boxes.forEach(box => {
    const these = box.data.flatMap((o, k) => o.meta === input.value ? [k] : [])
    if (these.length) Plotly.restyle(box, {visible: input.checked}, these)
  })))
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => boxes.forEach(o => Plotly.relayout(o, themed())))
  Promise.all(drawn).then(() => { document.documentElement.dataset.drawn = boxes.length })
}

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells]
  const value = (row, k) => { const o = row.cells[k]; return 'v' in o.dataset ? +o.dataset.v : o.textContent }
  const compared = (a, b) => a === '' || b === '' ? (a === '') - (b === '') :
    typeof a === typeof b && typeof a === 'number' ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true})
  heads.forEach((th, k) => {
    const button = document.createElement('button')
    button.type = 'button'
    button.append(...th.childNodes)
    th.append(button)
    button.addEventListener('click', () => {
      const down = th.getAttribute('aria-sort') === 'ascending'
      heads.forEach(o => o.removeAttribute('aria-sort'))
      th.setAttribute('aria-sort', down ? 'descending' : 'ascending')
      const rows = [...body.rows].map(row => [value(row, k), row])
      const empty = o => o[0] === ''
      rows.sort((a, b) => empty(a) || empty(b) ? empty(a) - empty(b) : (down ? -1 : 1) * compared(a[0], b[0]))
      body.append(...rows.map(o => o[1]))
    })
  })
}

function filtered(box) {
  const input = box.querySelector('input'), status = box.querySelector('output')
  const rows = [...document.getElementById(input.getAttribute('aria-controls')).tBodies[0].rows]
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/)
    rows.forEach(row => { const text = row.textContent.toLowerCase(); row.hidden = !words.every(o => text.includes(o)) })
    status.textContent = `${rows.filter(o => !o.hidden).length} of ${rows.length} rows`
  }
  box.hidden = false
  input.addEventListener('input', show)
  show()
}

all('table.sortable').forEach(sortable)
all('.filter').forEach(filtered)
charts()
