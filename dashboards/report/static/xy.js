// Points, curves, bands and intervals over two axes.

/** Draw a chart into a figure; returns `{mark(state)}`, which points out a budget and its best configuration. */
function drawXY(figure, chart) {
  const hidden = new Set();
  const stage = html("div", { class: "stage" });
  figure.append(stage, legend());
  const tooltip = new Tooltip(stage);
  let marked = null;
  let width = 0;
  let view = null;
  const crowded = chart.series.reduce((sum, s) => sum + (s.line ? 0 : s.points.length), 0) > 40; // tooltips tell intervals then

  function legend() {
    const entries = chart.series.filter((s) => !s.of);
    if (entries.length < 2) return html("div");
    return html("div", { class: "legend", role: "group", "aria-label": "series" }, ...entries.map(legendEntry));
  }

  function legendEntry(s) {
    const lined = s.line || chart.series.some((other) => other.of === s.name && other.line);
    const swatch = svg("svg", { viewBox: "0 0 24 12", width: 24, height: 12, "aria-hidden": "true" });
    if (lined) swatch.append(svg("path", { d: "M1,6H23", class: `curve ${colourClass(s.colour)}${s.dash ? " dash" : ""}` }));
    if (s.dots) swatch.append(marker(12, 6, s.colour, s.hollow, 4));
    const button = html("button", { type: "button", "aria-pressed": "true" }, swatch, html("span", {}, s.name));
    button.addEventListener("click", () => {
      if (!hidden.delete(s.name)) hidden.add(s.name);
      button.setAttribute("aria-pressed", String(!hidden.has(s.name)));
      draw(width);
    });
    return button;
  }

  function draw(newWidth) {
    width = newWidth;
    const shown = chart.series.filter((s) => !hidden.has(s.of || s.name));
    const height = Math.round(Math.min(440, Math.max(270, width * 0.62)));
    const margin = { left: 62, right: 14, top: 10, bottom: 46 };
    const all = shown.flatMap((s) => s.points);
    const xs = all.map((p) => p.x);
    const ys = all.flatMap((p) => [p.y, p.low, p.high]).filter((v) => v !== null && v !== undefined && v >= floor(all));
    const both = chart.diagonal ? [...xs, ...ys] : null;
    const x = makeScale(both || xs, chart.x.log, margin.left, width - margin.right, chart.diagonal);
    const y = makeScale(both || ys, chart.y.log, height - margin.bottom, margin.top, true);
    const root = svg("svg", {
      viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", tabindex: 0,
      "aria-label": `${chart.title}. ${all.length} points; arrow keys read them. The table below has the numbers.`,
    });
    root.append(axes(x, y, width, height, margin));
    if (chart.diagonal) root.append(diagonal(x, y, both));
    const markLayer = svg("g", { class: "mark" });
    view = { x, y, height, margin, markLayer, points: targets(shown, x, y) };
    for (const s of shown) root.append(drawSeries(s));
    root.append(markLayer);
    listen(root);
    stage.querySelector("svg")?.remove();
    stage.prepend(root);
    drawMark();
  }

  /** Intervals that reach towards zero must not squeeze a log scale: they run out of the chart instead. */
  function floor(points) {
    return chart.y.log ? 0.4 * Math.min(...points.map((p) => p.y).filter((v) => v > 0)) : -Infinity;
  }

  function axes(x, y, w, h, margin) {
    const layer = svg("g", { class: "axes" });
    const bottom = h - margin.bottom;
    for (const tick of x.ticks(Math.max(2, Math.floor((w - margin.left) / 85)))) {
      layer.append(svg("path", { d: `M${x(tick)},${margin.top}V${bottom}`, class: "grid" }));
      layer.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, tickLabel(tick, chart.x.unit)));
    }
    for (const tick of y.ticks(Math.max(3, Math.floor(h / 60)))) {
      layer.append(svg("path", { d: `M${margin.left},${y(tick)}H${w - margin.right}`, class: "grid" }));
      layer.append(svg("text", { x: margin.left - 7, y: y(tick) + 4, "text-anchor": "end" }, tickLabel(tick, chart.y.unit)));
    }
    layer.append(svg("path", { d: `M${margin.left},${margin.top}V${bottom}H${w - margin.right}`, class: "frame" }));
    const middle = (margin.left + w - margin.right) / 2;
    layer.append(svg("text", { x: middle, y: h - 8, "text-anchor": "middle", class: "label" }, cut(axisLabel(chart.x), w - margin.left)));
    const turned = `translate(14,${(margin.top + bottom) / 2}) rotate(-90)`;
    layer.append(svg("text", { transform: turned, "text-anchor": "middle", class: "label" }, cut(axisLabel(chart.y), h - margin.bottom)));
    return layer;
  }

  function diagonal(x, y, values) {
    const [low, high] = [Math.min(...values.filter((v) => v > 0 || !chart.x.log)), Math.max(...values)];
    return svg("path", { d: `M${x(low)},${y(low)}L${x(high)},${y(high)}`, class: "curve ink dash" });
  }

  function drawSeries(s) {
    const { x, y } = view;
    const end = view.height - view.margin.bottom;
    const layer = svg("g", { class: "series", "data-name": s.name });
    const points = s.points.filter((p) => x.shows(p.x) && y.shows(p.y));
    const limited = points.filter((p) => y.shows(p.high) && p.low !== null && p.low !== undefined);
    const foot = (p) => (y.shows(p.low) ? Math.min(y(p.low), end) : end);
    const colour = colourClass(s.colour);
    if (s.band && limited.length > 1) {
      const upper = limited.map((p) => `${x(p.x).toFixed(1)},${y(p.high).toFixed(1)}`);
      const lower = limited.map((p) => `${x(p.x).toFixed(1)},${foot(p).toFixed(1)}`).reverse();
      layer.append(svg("path", { d: `M${[...upper, ...lower].join("L")}Z`, class: `band ${colour}` }));
    }
    if (s.line && points.length > 1) {
      layer.append(svg("path", { d: s.step ? stairs(points) : curve(points), class: `curve ${colour}${s.dash ? " dash" : ""}` }));
    }
    if (!s.band && (s.line || !crowded)) {
      for (const p of limited) {
        layer.append(svg("path", { d: `M${x(p.x).toFixed(1)},${foot(p).toFixed(1)}V${y(p.high).toFixed(1)}`, class: `whisker ${colour}` }));
      }
    }
    if (s.dots) for (const p of points) layer.append(marker(x(p.x), y(p.y), s.colour, s.hollow, points.length > 150 ? 3 : 4.5));
    return layer;
  }

  function curve(points) {
    return `M${points.map((p) => `${view.x(p.x).toFixed(1)},${view.y(p.y).toFixed(1)}`).join("L")}`;
  }

  /** What a budget buys stays the same until it pays for the next better thing. */
  function stairs(points) {
    const [first, ...rest] = points;
    const steps = rest.map((p) => `H${view.x(p.x).toFixed(1)}V${view.y(p.y).toFixed(1)}`).join("");
    return `M${view.x(first.x).toFixed(1)},${view.y(first.y).toFixed(1)}${steps}H${width - view.margin.right}`;
  }

  function targets(shown, x, y) {
    return shown.flatMap((s) => s.points.filter((p) => x.shows(p.x) && y.shows(p.y)).map((p) => ({ ...p, series: s.name, left: x(p.x), top: y(p.y) })));
  }

  function describe(p) {
    const span = p.low !== null && p.low !== undefined ? ` (${short(p.low)} … ${short(p.high)})` : "";
    return [p.series, p.text, `${axisName(chart.x)} ${quantity(p.x, chart.x.unit)}`, `${axisName(chart.y)} ${short(p.y)}${span}`];
  }

  function listen(root) {
    let at = -1;
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect();
      const zoom = width / box.width;
      const [px, py] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
      let best = null;
      let least = 32 ** 2;
      for (const p of view.points) {
        const distance = (p.left - px) ** 2 + (p.top - py) ** 2;
        if (distance < least) [best, least] = [p, distance];
      }
      if (best) tooltip.show(describe(best), best.left, best.top);
      else tooltip.hide();
    });
    root.addEventListener("pointerleave", () => tooltip.hide());
    root.addEventListener("blur", () => tooltip.hide());
    root.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") tooltip.hide();
      if (!step || !view.points.length) return;
      event.preventDefault();
      at = (at + step + view.points.length) % view.points.length;
      const p = view.points[at];
      tooltip.show(describe(p), p.left, p.top);
    });
  }

  function drawMark() {
    if (!marked || !view) return;
    const { x, y, height, margin, markLayer } = view;
    const line = svg("path", { d: `M${x(marked.budget)},${margin.top}V${height - margin.bottom}`, class: "budget" });
    markLayer.replaceChildren(line);
    const p = marked.mark;
    if (p && x.shows(p.x) && y.shows(p.y)) markLayer.append(svg("circle", { cx: x(p.x), cy: y(p.y), r: 9, class: "ring" }));
  }

  responsive(stage, draw);
  return {
    mark(state) {
      marked = state;
      drawMark();
    },
  };
}

function axisName(axis) {
  return axis.label.split(",")[0];
}

function axisLabel(axis) {
  const scale = axis.log ? ", log scale" : "";
  return axis.unit ? `${axis.label} (${axis.unit}${scale})` : scale ? `${axis.label} (${scale.slice(2)})` : axis.label;
}
