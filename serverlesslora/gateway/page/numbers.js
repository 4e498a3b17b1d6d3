// Numbers as people read them, always with their unit.

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const count = (value) => (value < 1e6 ? plain.format(value) : `${short.format(value / 1e6)} M`);
export const counted = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;
export const percent = (share) => `${short.format(100 * share)} %`;
export const perSecond = (value, what) => `${short.format(value)} ${what}/s`;

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.0005) return "0 ms";
  if (value < 0.9995) return `${value < 0.01 ? (value * 1000).toFixed(1) : Math.round(value * 1000)} ms`;
  if (value < 60) return `${short.format(value)} s`;
  return age(value);
}

export function age(value) {
  if (value < 60) return `${Math.floor(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 86400) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86400)} d ${Math.floor((value % 86400) / 3600)} h`;
}

export function bytes(value) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (value >= size) return `${short.format(value / size)} ${unit}`;
  }
  return `${value} B`;
}

export function money(value, currency) {
  if (!currency) return "–";
  if (value === 0) return `0 ${currency}`;
  const digits = new Intl.NumberFormat("en", value < 0.01 ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: value < 1 ? 3 : 2 });
  return value < 0.9995e-3 ? `${short.format(Number((value * 1e6).toPrecision(2)))} µ${currency}` : `${digits.format(value)} ${currency}`;
}

export const clock = (unixS) => new Date(unixS * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
