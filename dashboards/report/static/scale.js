// Scales, ticks and numbers.

const PREFIXES = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"], [1e-9, "n"]];
const PREFIXED = ["FLOPs", "B", "s"];

/** Significant digits without trailing zeros: 0.25, 1,200, 3e-7. */
function short(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e7) return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  const rounded = Number(value.toPrecision(digits));
  return Math.abs(rounded) >= 1000 ? rounded.toLocaleString("en") : String(rounded);
}

/** A number with its unit and a decimal prefix: 32.4 MFLOPs. */
function quantity(value, unit) {
  if (!unit) return short(value);
  if (!PREFIXED.includes(unit) || !value) return `${short(value)} ${unit}`;
  const [factor, prefix] = PREFIXES.find(([f]) => Math.abs(value) >= f * 0.9995) || PREFIXES[PREFIXES.length - 1];
  return `${short(value / factor)} ${prefix}${unit}`;
}

/** A tick's label: sizes from a thousand on get a prefix, without repeating the unit. */
function tickLabel(value, unit) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e3 || (PREFIXED.includes(unit) && size < 0.1)) {
    const [factor, prefix] = PREFIXES.find(([f]) => size >= f * 0.9995) || PREFIXES[PREFIXES.length - 1];
    return `${short(value / factor)}${prefix ? ` ${prefix}` : ""}`;
  }
  return short(value);
}

function niceStep(span, count) {
  const raw = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const factor = [1, 2, 5, 10].find((f) => f * power >= raw * 0.999);
  return factor * power;
}

function linearTicks(low, high, count) {
  const step = niceStep(high - low || 1, count);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.5) return linearTicks(low, high, count);
  const steps = decades > count ? [1] : decades > count / 2 ? [1, 3] : [1, 2, 5];
  const skip = Math.max(1, Math.ceil(decades / Math.max(1, count)));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (steps.length === 1 && power % skip) continue;
    for (const step of steps) {
      const tick = Number((step * 10 ** power).toPrecision(6));
      if (tick >= low * 0.9999 && tick <= high * 1.0001) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : linearTicks(low, high, count);
}

/** A scale from values to pixels: a function with `ticks(count)`. A little room is left at both ends. */
function makeScale(values, log, start, end, fromZero = false) {
  const known = values.filter((v) => v !== null && Number.isFinite(v) && (!log || v > 0));
  let low = known.length ? Math.min(...known) : 0.1;
  let high = known.length ? Math.max(...known) : 1;
  if (log) {
    const room = Math.max(0.04 * Math.log(high / low), high === low ? 0.7 : 0.02);
    low *= Math.exp(-room);
    high *= Math.exp(room);
  } else {
    if (fromZero && low > 0 && low < 0.6 * high) low = 0;
    const room = 0.05 * (high - low) || Math.abs(high) * 0.1 || 0.5;
    low = low === 0 ? 0 : low - room;
    high += room;
  }
  const place = log ? Math.log : (v) => v;
  const slope = (end - start) / (place(high) - place(low));
  const scale = (v) => start + (place(v) - place(low)) * slope;
  scale.ticks = (count) => (log ? logTicks(low, high, count) : linearTicks(low, high, count));
  scale.shows = (v) => v !== null && Number.isFinite(v) && (!log || v > 0);
  return scale;
}
