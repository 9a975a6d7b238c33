// Puts the charts into their figures and wires sliders and menus. Everything shown comes from the page's data.

const DRAW = { xy: drawXY, bars: drawBars, forest: drawForest, parallel: drawParallel };

function readData() {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const chart of data.charts) {
    for (const item of [...(chart.series || []).flatMap((s) => s.points), ...(chart.lines || []), ...(chart.rows || [])]) {
      if (typeof item.text === "number") item.text = data.texts[item.text];
    }
  }
  return data;
}

/** A slider over budgets: its position states the optimum in words and points it out in the chart. */
function wireSlider(panel, slider, drawn) {
  const input = panel.querySelector("input.budget");
  const budget = panel.querySelector("output.budget");
  const statement = panel.querySelector(".statement");
  const update = () => {
    const state = slider.states[Number(input.value)];
    budget.textContent = state.label;
    statement.textContent = state.text;
    input.setAttribute("aria-valuetext", state.label);
    if (drawn.mark) drawn.mark(state);
  };
  input.disabled = false;
  input.addEventListener("input", update);
  update();
}

/** Where a section has several groups, a menu shows one at a time. */
function wireGroups(section) {
  const groups = [...section.querySelectorAll(":scope > .group")];
  if (groups.length < 2) return;
  const menu = html("select", {}, ...groups.map((g, i) => html("option", { value: i }, g.dataset.name)));
  const show = () => groups.forEach((g, i) => { g.hidden = i !== Number(menu.value); });
  groups[0].before(html("label", { class: "menu" }, "Show ", menu));
  menu.addEventListener("change", show);
  show();
}

function main() {
  const data = readData();
  document.documentElement.classList.add("scripted");
  document.querySelectorAll("section").forEach(wireGroups); // first: what is hidden is drawn when it is shown
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    const chart = data.charts[Number(figure.dataset.chart)];
    const drawn = DRAW[chart.kind](figure, chart);
    if (figure.dataset.slider) wireSlider(figure.closest(".panel"), data.sliders[Number(figure.dataset.slider)], drawn);
  }
}

main();
