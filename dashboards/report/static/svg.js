// Elements, markers and tooltips; COLOURS, their number, is given by render.py. The report's script files share one scope, in the order that render.py names.

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children; strings become text, never markup. */
function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** An HTML element with attributes and children. */
function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-0.9 * r},${-0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}Z`,
  (r) => `M0,${-1.3 * r}L${1.3 * r},0L0,${1.3 * r}L${-1.3 * r},0Z`,
  (r) => `M0,${-1.2 * r}L${1.15 * r},${0.9 * r}H${-1.15 * r}Z`,
  (r) => `M0,${1.2 * r}L${1.15 * r},${-0.9 * r}H${-1.15 * r}Z`,
  (r) => `M${-r},${-0.4 * r}h${0.6 * r}v${-0.6 * r}h${0.8 * r}v${0.6 * r}h${0.6 * r}v${0.8 * r}h${-0.6 * r}v${0.6 * r}h${-0.8 * r}v${-0.6 * r}h${-0.6 * r}Z`,
];

/** Class of a colour; -1 is the colour of text, for what belongs to no method. */
function colourClass(index) {
  return index < 0 ? "ink" : `c${index % COLOURS}`;
}

/** A marker: colour and shape change together, so that neither is needed to tell two series apart. */
function marker(x, y, index, hollow, radius = 4.5) {
  const shape = SHAPES[Math.max(0, index + Math.floor(Math.max(0, index) / COLOURS)) % SHAPES.length];
  return svg("path", {
    d: shape(radius),
    transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
    class: `marker ${colourClass(index)}${hollow ? " hollow" : ""}`,
  });
}

/** A box that follows the pointer or the keyboard inside a figure. */
class Tooltip {
  constructor(figure) {
    this.figure = figure;
    this.box = html("div", { class: "tooltip", role: "status", hidden: true });
    figure.append(this.box);
  }

  show(lines, x, y) {
    this.box.replaceChildren(...lines.filter(Boolean).map((line) => html("div", {}, line)));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const room = this.figure.clientWidth;
    const left = Math.min(Math.max(0, x + 12), Math.max(0, room - width));
    this.box.style.left = `${left}px`;
    this.box.style.top = `${y - height - 10 < 0 ? y + 16 : y - height - 10}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}

/** Draw now and whenever the width changes; what is not visible yet is drawn when it becomes so. */
function responsive(figure, draw) {
  let last = 0;
  const redraw = () => {
    const width = Math.floor(figure.clientWidth);
    if (width < 40 || width === last) return;
    last = width;
    draw(width);
  };
  new ResizeObserver(redraw).observe(figure);
  redraw();
}

/** Cut a label to what fits, in characters of average width. */
function cut(text, pixels, size = 6.6) {
  const room = Math.max(4, Math.floor(pixels / size));
  return text.length > room ? `${text.slice(0, room - 1)}…` : text;
}
