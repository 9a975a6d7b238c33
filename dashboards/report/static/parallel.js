// Parallel coordinates: a line per configuration, coloured by its error; a slider fades all but the best.

const BINS = 9;
const HEIGHT = 380;
const LEAST = 92; // pixels per axis; narrower pages scroll inside the chart

function drawParallel(figure, chart) {
  const stage = html("div", { class: "stage wide", tabindex: 0, role: "group", "aria-label": `${chart.title}; scrolls sideways` });
  const share = html("input", { type: "range", min: 1, max: 100, value: 100, "aria-label": "share of configurations shown, the best first" });
  const told = html("output", {});
  figure.append(html("label", { class: "slider" }, "Show the best ", told, share), stage);
  const tooltip = new Tooltip(stage);
  const ranked = [...chart.lines].sort((a, b) => a.error - b.error);
  const rank = new Map(ranked.map((line, i) => [line, i]));
  let drawn = [];

  function fade() {
    const kept = Math.max(1, Math.round((ranked.length * share.value) / 100));
    told.textContent = `${share.value} % (${kept} of ${ranked.length})`;
    for (const { line, path } of drawn) path.classList.toggle("faded", rank.get(line) >= kept);
  }

  responsive(stage, (outer) => {
    const width = Math.max(outer, LEAST * chart.axes.length);
    const root = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, class: "chart fixed", role: "img", "aria-label": `${chart.title}. ${chart.lines.length} lines. The table below has the numbers.` });
    const top = 44;
    const bottom = HEIGHT - 34;
    const left = (k) => 40 + ((width - 100) * k) / Math.max(1, chart.axes.length - 1);
    const scales = chart.axes.map((axis, k) => {
      if (axis.levels) {
        const count = Math.max(1, axis.levels.length - 1);
        return (v) => (axis.levels.length === 1 ? (top + bottom) / 2 : bottom - ((bottom - top) * v) / count);
      }
      return makeScale(chart.lines.map((line) => line.values[k]), axis.log, bottom, top);
    });
    const place = (line, k) => (line.values[k] === null ? bottom + 20 : scales[k](line.values[k]));
    drawn = [...ranked].reverse().map((line) => {
      const points = chart.axes.map((_, k) => `${left(k).toFixed(1)},${place(line, k).toFixed(1)}`);
      const bin = ranked.length > 1 ? Math.floor((rank.get(line) / (ranked.length - 1)) * (BINS - 1)) : 0;
      const path = svg("path", { d: `M${points.join("L")}`, class: `thread r${bin}` });
      path.addEventListener("pointerenter", (event) => {
        const box = stage.getBoundingClientRect();
        tooltip.show([line.text, `error ${short(line.error)}`], event.clientX - box.left + stage.scrollLeft, event.clientY - box.top);
      });
      path.addEventListener("pointerleave", () => tooltip.hide());
      root.append(path);
      return { line, path };
    });
    chart.axes.forEach((axis, k) => root.append(drawAxis(axis, k)));
    stage.querySelector("svg")?.remove();
    stage.prepend(root);
    fade();

    function drawAxis(axis, k) {
      const layer = svg("g", { class: "axes" });
      layer.append(svg("path", { d: `M${left(k)},${top}V${bottom}`, class: "frame" }));
      const name = svg("text", { x: left(k), y: k % 2 ? 14 : 30, "text-anchor": k ? "middle" : "start", class: "label" }, cut(axis.name, 150));
      name.append(svg("title", {}, axis.name));
      layer.append(name);
      const ticks = axis.levels ? axis.levels.map((label, i) => [scales[k](i), label]) : scales[k].ticks(5).map((v) => [scales[k](v), tickLabel(v, "")]);
      for (const [y, label] of ticks) {
        const text = svg("text", { x: left(k) + 5, y: y + 4, class: "halo" }, cut(label, LEAST + 20));
        text.append(svg("title", {}, label));
        layer.append(text);
      }
      if (chart.lines.some((line) => line.values[k] === null)) {
        layer.append(svg("text", { x: left(k), y: bottom + 30, "text-anchor": "middle" }, "none"));
      }
      return layer;
    }
  });
  share.addEventListener("input", fade);
  return {};
}
