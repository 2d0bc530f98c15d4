/** The dashboard as SVG, for readers without a Grafana: each panel's queries as lines over time. */

export interface Line {
  readonly name: string;
  /** [seconds, value]; NaN where there is none. */
  readonly points: readonly (readonly [number, number])[];
}

export interface Plot {
  readonly title: string;
  /** As Grafana names it: s, Bps, … */
  readonly unit: string;
  readonly lines: readonly Line[];
}

const COLUMNS = 2;
const WIDTH = 560;
const HEIGHT = 190;
const LEFT = 62;
const TOP = 26;
const BOTTOM = 46;
const COLOURS = ['#73bf69', '#f2cc0c', '#5794f2', '#ff780a', '#f2495c', '#b877d9', '#37872d', '#8ab8ff', '#c4162a', '#fade2a'];
/** Names that fit below a panel. */
const NAMES = 8;

/** All panels, in two columns. */
export function picture(plots: readonly Plot[]): string {
  const width = COLUMNS * WIDTH;
  const height = Math.ceil(plots.length / COLUMNS) * HEIGHT;
  const panels = plots.map(
    (plot, i) => `<g transform="translate(${(i % COLUMNS) * WIDTH} ${Math.floor(i / COLUMNS) * HEIGHT})">${panel(plot)}</g>`,
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="sans-serif" font-size="10" fill="#ccccdc">
<rect width="100%" height="100%" fill="#111217"/>
${panels.join('\n')}
</svg>
`;
}

function panel({ title, unit, lines }: Plot): string {
  const points = lines.flatMap((line) => line.points).filter(([, value]) => Number.isFinite(value));
  const [from, to] = [Math.min(...points.map(([time]) => time)), Math.max(...points.map(([time]) => time))];
  const most = Math.max(...points.map(([, value]) => value)) || 1;
  const x = (time: number) => LEFT + ((time - from) / (to - from || 1)) * (WIDTH - LEFT - 16);
  const y = (value: number) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - TOP - BOTTOM);
  const parts = [
    `<rect x="4" y="4" width="${WIDTH - 8}" height="${HEIGHT - 8}" fill="#181b1f" stroke="#2c3235"/>`,
    `<text x="12" y="18" font-size="12" font-weight="600">${escaped(title)}</text>`,
  ];
  for (const part of [0, 0.5, 1]) {
    const at = y(most * part).toFixed(1);
    parts.push(`<path d="M${LEFT} ${at}H${WIDTH - 16}" stroke="#2c3235"/>`);
    parts.push(`<text x="${LEFT - 5}" y="${Number(at) + 3}" text-anchor="end">${escaped(amount(most * part, unit))}</text>`);
  }
  // Those with the most to show first.
  const peak = (line: Line) => Math.max(0, ...line.points.map(([, value]) => (Number.isFinite(value) ? value : 0)));
  [...lines]
    .sort((a, b) => peak(b) - peak(a))
    .forEach((line, i) => {
      const colour = COLOURS[i % COLOURS.length];
      let pen = 'M';
      let path = '';
      for (const [time, value] of line.points) {
        if (!Number.isFinite(value)) {
          pen = 'M';
          continue;
        }
        path += `${pen}${x(time).toFixed(0)} ${y(value).toFixed(1)}`;
        pen = 'L';
      }
      parts.push(`<path d="${path}" fill="none" stroke="${colour}" stroke-width="1.2"/>`);
      if (i >= NAMES) return;
      const [column, row] = [i % 4, Math.floor(i / 4)];
      const at = [14 + column * 135, HEIGHT - 26 + row * 13] as const;
      parts.push(`<rect x="${at[0]}" y="${at[1] - 7}" width="9" height="3" fill="${colour}"/>`);
      parts.push(`<text x="${at[0] + 13}" y="${at[1]}">${escaped(line.name)}</text>`);
    });
  return parts.join('');
}

function amount(value: number, unit: string): string {
  const [scale, suffix] = unit === 's' && value < 1 ? (value < 1e-3 ? [1e6, ' µs'] : [1e3, ' ms']) : [1, unit === 's' ? ' s' : ''];
  const scaled = value * scale;
  const [short, letter] = scaled >= 1e6 ? [scaled / 1e6, ' M'] : scaled >= 1e4 ? [scaled / 1e3, ' k'] : [scaled, ''];
  return `${short.toFixed(short < 10 && short > 0 ? 2 : 0)}${letter}${suffix}${unit === 'Bps' ? 'B/s' : unit === 'bytes' ? 'B' : ''}`;
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}
