/** dashboard.json by the types that Grafana publishes; each panel must be one whose options are known here. */
import type { Dashboard, FieldConfig, FieldConfigSource, Panel, VariableModel } from '@grafana/schema';
import type * as TimeSeries from '@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen';

/** The same with the strings of JSON where TypeScript has enumerations. */
type Json<T> = T extends string
  ? `${T}`
  : T extends number | boolean | null | undefined
    ? T
    : T extends readonly (infer Item)[]
      ? Json<Item>[]
      : T extends object
        ? { [Key in keyof T]: Json<T[Key]> }
        : T;

interface PrometheusQuery {
  refId: string;
  expr: string;
  legendFormat: string;
  datasource: Panel['datasource'];
}

/** What every panel of ours has: Grafana itself would take less. */
interface Described extends Omit<Panel, 'fieldConfig' | 'options' | 'targets' | 'type' | 'timeCompare'> {
  title: string;
  description: string;
  targets: PrometheusQuery[];
}

interface TimeSeriesPanel extends Described {
  type: 'timeseries';
  options: TimeSeries.Options;
  fieldConfig: Omit<FieldConfigSource, 'defaults'> & {
    defaults: Omit<FieldConfig, 'custom'> & { unit: string; custom: TimeSeries.FieldConfig };
  };
}

export type CheckedDashboard = Json<
  Omit<Dashboard, 'panels' | 'templating'> & { panels: TimeSeriesPanel[]; templating: { list: VariableModel[] } }
>;
