// Charts with a line of text per row: stacked bars, and differences with their intervals.

const ROW = 40;
const FOOT = 44;

function rowFrame(chart, width, values, fromZero) {
  const height = chart.rows.length * ROW + FOOT;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": `${chart.title}. The table below has the numbers.` });
  const x = makeScale(values, false, 8, width - 14, fromZero);
  const bottom = height - FOOT;
  for (const tick of x.ticks(Math.max(2, Math.floor(width / 95)))) {
    root.append(svg("path", { d: `M${x(tick)},4V${bottom}`, class: tick === 0 ? "frame" : "grid" }));
    root.append(svg("text", { x: x(tick), y: bottom + 16, "text-anchor": x(tick) < 20 ? "start" : "middle" }, tickLabel(tick, chart.x.unit)));
  }
  root.append(svg("text", { x: width / 2, y: height - 8, "text-anchor": "middle", class: "label" }, cut(axisLabel(chart.x), width)));
  chart.rows.forEach((row, i) => {
    const label = svg("text", { x: 8, y: i * ROW + 16, class: "row halo" }, cut(row.label, width - 20));
    label.append(svg("title", {}, row.label));
    root.append(label);
  });
  return { root, x };
}

/** Stacked horizontal bars with a legend of their parts. */
function drawBars(figure, chart) {
  const stage = html("div", { class: "stage" });
  figure.append(stage);
  if (chart.parts.length > 1) {
    figure.append(html("div", { class: "legend" }, ...chart.parts.map((part, k) => {
      const swatch = svg("svg", { viewBox: "0 0 14 12", width: 14, height: 12, "aria-hidden": "true" });
      swatch.append(svg("rect", { x: 1, y: 1, width: 12, height: 10, class: `bar ${colourClass(k)}` }));
      return html("span", {}, swatch, part);
    })));
  }
  const tooltip = new Tooltip(stage);
  responsive(stage, (width) => {
    const totals = chart.rows.map((row) => row.values.reduce((a, b) => a + b, 0));
    const { root, x } = rowFrame(chart, width, [0, ...totals, chart.x.to ?? 0], true);
    chart.rows.forEach((row, i) => {
      let sum = 0;
      row.values.forEach((value, k) => {
        const bar = svg("rect", {
          x: x(sum), y: i * ROW + 21, width: Math.max(0, x(sum + value) - x(sum)), height: 13, class: `bar ${colourClass(k)}`,
        });
        const at = x(sum + value / 2);
        const lines = [row.label, `${chart.parts[k]}: ${quantity(value, chart.x.unit)}`];
        bar.addEventListener("pointerenter", () => tooltip.show(lines, at, i * ROW + 21));
        bar.addEventListener("pointerleave", () => tooltip.hide());
        root.append(bar);
        sum += value;
      });
    });
    stage.querySelector("svg")?.remove();
    stage.prepend(root);
  });
  return {};
}

/** Differences with intervals around zero; hollow where the interval holds zero. */
function drawForest(figure, chart) {
  const stage = html("div", { class: "stage" });
  figure.append(stage);
  const tooltip = new Tooltip(stage);
  responsive(stage, (width) => {
    const { root, x } = rowFrame(chart, width, [0, ...chart.rows.flatMap((r) => [r.low, r.high])], false);
    chart.rows.forEach((row, i) => {
      const y = i * ROW + 28;
      const separated = row.low > 0 || row.high < 0;
      const colour = colourClass(row.high < 0 ? 2 : row.low > 0 ? 1 : 7);
      const group = svg("g", {});
      group.append(svg("path", { d: `M${x(row.low)},${y}H${x(row.high)}`, class: `whisker strong ${colour}` }));
      group.append(marker(x(row.value), y, row.high < 0 ? 2 : row.low > 0 ? 1 : 7, !separated, 5));
      group.append(svg("rect", { x: 0, y: i * ROW + 4, width, height: ROW - 4, class: "catch" }));
      const lines = [row.label, `${short(row.value)} (${short(row.low)} … ${short(row.high)})`, row.text];
      group.addEventListener("pointerenter", () => tooltip.show(lines, x(row.value), y));
      group.addEventListener("pointerleave", () => tooltip.hide());
      root.append(group);
    });
    stage.querySelector("svg")?.remove();
    stage.prepend(root);
  });
  return {};
}
