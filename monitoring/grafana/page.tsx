/**
 * The dashboard as a page of Grafana's own components: panels, time series with axes and legends, field options, units, colours. What
 * Grafana's server and its Prometheus data source do is here in short: variables, queries, names by legendFormat.
 *
 * page.html?prometheus=URL&from=SECONDS&to=SECONDS&scrape=SECONDS; body has data-state=ready and data-problems at the end.
 */
import '@fontsource/inter/400.css';
import '@fontsource/inter/500.css';
import {
  applyFieldOverrides,
  createTheme,
  type DataFrame,
  dateTime,
  type Field,
  type FieldConfig,
  FieldConfigOptionsRegistry,
  type FieldConfigPropertyItem,
  FieldType,
  type GrafanaTheme2,
  getFieldDisplayName,
  getValueFormats,
  identityOverrideProcessor,
  renderLegendFormat,
  ThemeContext,
  type TimeRange,
} from '@grafana/data';
import {
  AxisColorMode,
  AxisPlacement,
  type Dashboard,
  FieldColorModeId,
  GraphDrawStyle,
  type GraphFieldConfig,
  GraphGradientMode,
  LineInterpolation,
  type Panel,
  ScaleDistribution,
  StackingMode,
  VisibilityMode,
  type VizLegendOptions,
} from '@grafana/schema';
import { GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import json from './dashboard.json';

const dashboard = json as unknown as Dashboard;
const panels = (dashboard.panels ?? []) as Panel[];

const given = new URLSearchParams(location.search);
const number = (name: string) => Number(given.get(name));
const range = { from: number('from'), to: number('to') };
/** As Grafana computes them from the data source's scrape interval, for panels as wide as these. */
const step = Math.max(number('scrape'), 1);
const rateInterval = Math.max(step + number('scrape'), 4 * number('scrape'));

const problems: string[] = [];

/** Grafana's defaults of a time series (`defaults` in the panel's own source is not published). */
const CUSTOM: GraphFieldConfig = {
  drawStyle: GraphDrawStyle.Line,
  lineInterpolation: LineInterpolation.Linear,
  lineWidth: 1,
  fillOpacity: 0,
  gradientMode: GraphGradientMode.None,
  showPoints: VisibilityMode.Auto,
  pointSize: 5,
  spanNulls: false,
  insertNulls: false,
  axisPlacement: AxisPlacement.Auto,
  axisColorMode: AxisColorMode.Text,
  axisGridShow: true,
  axisCenteredZero: false,
  axisBorderShow: false,
  scaleDistribution: { type: ScaleDistribution.Linear },
  stacking: { mode: StackingMode.None, group: 'A' },
  hideFrom: { legend: false, tooltip: false, viz: false },
};

/** A field option as dashboards name it; those of the time series are below `custom`. */
function option(path: string, isCustom: boolean): FieldConfigPropertyItem {
  return {
    id: isCustom ? `custom.${path}` : path,
    path,
    name: path,
    isCustom,
    editor: () => null,
    override: () => null,
    process: identityOverrideProcessor,
    shouldApply: ({ type }: Field) => type !== FieldType.time,
  };
}

const registry = new FieldConfigOptionsRegistry(() => [
  ...['unit', 'min', 'max', 'decimals', 'displayName', 'noValue', 'thresholds', 'mappings', 'color'].map((path) => option(path, false)),
  ...Object.keys(CUSTOM).map((path) => option(path, true)),
]);

interface Series {
  metric: Record<string, string>;
  values: [number, string][];
}

/** One query of a panel: a frame for each series. */
async function frames(target: Record<string, unknown>): Promise<DataFrame[]> {
  const expr = String(target['expr']).replaceAll('$instance', '.*').replaceAll('$__rate_interval', `${rateInterval}s`);
  const url = `${given.get('prometheus')}/api/v1/query_range?query=${encodeURIComponent(expr)}&start=${range.from}&end=${range.to}&step=${step}`;
  const answer = (await (await fetch(url)).json()) as { data?: { result: Series[] }; error?: string };
  if (answer.data === undefined) throw new Error(answer.error);
  return answer.data.result.map(({ metric, values }) => ({
    refId: String(target['refId']),
    length: values.length,
    fields: [
      { name: 'Time', type: FieldType.time, config: {}, values: values.map(([time]) => time * 1000) },
      {
        name: 'Value',
        type: FieldType.number,
        labels: metric,
        config: { displayNameFromDS: renderLegendFormat(String(target['legendFormat']), metric) },
        values: values.map(([, value]) => (Number.isFinite(Number(value)) ? Number(value) : null)),
      },
    ],
  }));
}

async function fields(panel: Panel, theme: GrafanaTheme2): Promise<DataFrame[]> {
  const title = panel.title ?? '';
  const { defaults, overrides } = panel.fieldConfig ?? { defaults: {}, overrides: [] };
  if (defaults.unit !== undefined && !units.has(defaults.unit)) problems.push(`${title}: Grafana knows no unit ${defaults.unit}`);
  for (const path of Object.keys(defaults.custom ?? {})) if (!(path in CUSTOM)) problems.push(`${title}: no option ${path}`);
  const config: FieldConfig = {
    ...(defaults as FieldConfig),
    color: (defaults.color as FieldConfig['color']) ?? { mode: FieldColorModeId.PaletteClassic },
    custom: { ...CUSTOM, ...defaults.custom },
  };
  const data = (await Promise.all((panel.targets ?? []).map(frames))).flat();
  const result = applyFieldOverrides({
    data,
    fieldConfig: { defaults: config, overrides: overrides as [] },
    fieldConfigRegistry: registry,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
  });
  for (const { refId } of panel.targets ?? []) {
    const some = data.filter((frame) => frame.refId === refId).some((frame) => frame.fields[1]?.values.some((value) => value !== null));
    if (!some) problems.push(`${title}: no data for query ${refId}`);
  }
  const names = result.map((frame) => getFieldDisplayName(frame.fields[1] as Field, frame, result));
  if (new Set(names).size < names.length) problems.push(`${title}: two lines of the same name`);
  if (names.some((name) => /^Value|\{\{/.test(name))) problems.push(`${title}: a line without a name`);
  return result;
}

const units = new Set(getValueFormats().flatMap(({ submenu }) => submenu?.map(({ value }) => value as string) ?? []));

/** Grafana's grid: 24 columns, rows of 30 pixels, 8 pixels between them. */
const WIDTH = 1200;
const at = (columns: number) => (columns * (WIDTH - 8)) / 24 + 8;
const down = (rows: number) => rows * 38 + 8;

async function page(): Promise<void> {
  const theme = createTheme({ colors: { mode: 'dark' } });
  const timeRange: TimeRange = {
    from: dateTime(range.from * 1000),
    to: dateTime(range.to * 1000),
    raw: { from: dateTime(range.from * 1000), to: dateTime(range.to * 1000) },
  };
  const data = await Promise.all(panels.map((panel) => fields(panel, theme)));
  const rows = Math.max(...panels.map(({ gridPos }) => (gridPos?.y ?? 0) + (gridPos?.h ?? 0)));
  document.body.style.background = theme.colors.background?.canvas ?? '';
  createRoot(document.getElementById('root') as HTMLElement).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: WIDTH, height: down(rows) }}>
        {panels.map((panel, i) => {
          const { x, y, w, h } = panel.gridPos ?? { x: 0, y: 0, w: 24, h: 8 };
          return (
            <div key={panel.id} style={{ position: 'absolute', left: at(x), top: down(y) }}>
              <PanelChrome title={panel.title ?? ''} description={panel.description ?? ''} width={at(w) - 16} height={h * 38 - 8}>
                {(width, height) => (
                  <TimeSeries
                    frames={data[i] as DataFrame[]}
                    width={width}
                    height={height}
                    timeRange={timeRange}
                    timeZone="utc"
                    legend={panel.options?.['legend'] as VizLegendOptions}
                  />
                )}
              </PanelChrome>
            </div>
          );
        })}
      </div>
    </ThemeContext.Provider>,
  );
  document.body.dataset['height'] = String(down(rows));
}

page()
  .catch((error: unknown) => problems.push(String(error)))
  .finally(() => {
    document.body.dataset['problems'] = JSON.stringify(problems);
  });
