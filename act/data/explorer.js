(() => {
const root = document.getElementById('ID'), all = s => [...root.querySelectorAll(s)], d = JSON.parse(root.querySelector('.data').textContent)
const [p, lam] = all('input[type=range]'), radios = all('input[type=radio]'), box = root.querySelector('input[type=checkbox]')
const text = v => `${v[0].toFixed(d.digits)} [${v[1].toFixed(d.digits)}, ${v[2].toFixed(d.digits)}]`, percent = v => 100*v/d.most + '%', set = (o, a) => Object.entries(a).forEach(([k, v]) => o.setAttribute(k, v))
const X = v => 40 + 270*(v - d.span[0][0])/(d.span[0][1] - d.span[0][0]), Y = v => 212 - 200*(v - d.span[1][0])/(d.span[1][1] - d.span[1][0])
const [keep, back] = ['retained', 'recovered'].map(o => d.columns.indexOf(o)), line = curve => curve.map(v => `${X(v[keep][0])},${Y(v[back][0])}`).join(' ')
function show() {
  const i = +p.value, j = +lam.value, r = radios.findIndex(o => o.checked), s = d.said.sft.length > 1 ? +box.checked : 0
  const curves = d.values[s][r], now = curves[i], here = now[j], [x, y] = [here[keep], here[back]];
  [[p, d.said.p[i]], [lam, d.said.lam[j]]].forEach(([o, t]) => { o.setAttribute('aria-valuetext', t); o.parentNode.querySelector('b').textContent = t })
  root.querySelector('output').textContent = `p ${d.said.p[i]}, λ ${d.said.lam[j]}, ranked ${d.said.rank[r]}, ${d.said.sft[s]} fine-tuning: ${d.columns.map((c, k) => `${c} ${text(here[k])}`).join(', ')}.`
  all('.b').forEach((b, k) => {
    const v = here[k]
    b.querySelector('.v').textContent = text(v)
    b.querySelector('.f').style.width = percent(v[0])
    Object.assign(b.querySelector('.e').style, {left: percent(v[1]), width: percent(v[2] - v[1])})
  })
  const map = d.cells[r][i], numbers = all('.c + .n')
  all('.c').forEach((c, k) => { c.setAttribute('fill-opacity', map.shade[k]); numbers[k].textContent = map.text[k] })
  root.querySelector('.note').textContent = document.getElementById('ID-map').textContent = map.title
  document.getElementById('ID-trade').textContent = `Recovered against retained for every λ at p ${d.said.p[i]}`
  all('.o').forEach((o, k) => o.setAttribute('points', line(curves[k])))
  root.querySelector('.s').setAttribute('points', line(now))
  all('.d').forEach((o, k) => set(o, {cx: X(now[k][keep][0]), cy: Y(now[k][back][0])}))
  set(root.querySelector('.h'), {cx: X(x[0]), cy: Y(y[0])})
  root.querySelector('.x').setAttribute('d', `M${X(x[1])} ${Y(y[0])}H${X(x[2])}M${X(x[0])} ${Y(y[1])}V${Y(y[2])}`)
}
root.addEventListener('input', show); show()
})()
