//! `merganser stages`: what can be written into a pipeline. The text comes from the types that parse it.

use crate::cli::StagesArgs;
use crate::exit::{ExitCode, Failure, Result};
use crate::report::{Align, Table};
use merganser_stages::{Content, MethodDoc, Port, StageKind, did_you_mean, kinds};
use serde::Serialize;
use serde_json::Value;
use std::fmt::Write;

/// Methods of a kind that fit beside it in the overview.
const LISTED_METHODS: usize = 5;

pub fn stages(args: &StagesArgs) -> Result<ExitCode> {
    let Some(kind) = &args.kind else { return all(args.json) };
    let kind = kinds().iter().find(|candidate| candidate.id() == kind).ok_or_else(|| {
        Failure::user_help(
            format!("there is no stage kind `{kind}`"),
            did_you_mean(kind, kinds().iter().map(|kind| kind.id())),
        )
    })?;
    let mut methods = kind.methods();
    if let Some(wanted) = &args.method {
        let help = did_you_mean(wanted, methods.iter().map(|method| method.id));
        methods.retain(|method| method.id == wanted);
        if methods.is_empty() {
            return Err(Failure::user_help(format!("`{}` has no method `{wanted}`", kind.id()), help));
        }
    }
    if args.json {
        let report = KindReport::new(*kind, &methods);
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
    } else if args.method.is_some() || kind.method_key().is_none() {
        out!("{}", describe(*kind, &methods[0]));
    } else {
        out!("{}", overview(*kind, &methods));
    }
    Ok(ExitCode::Done)
}

fn all(json: bool) -> Result<ExitCode> {
    if json {
        let kinds: Vec<KindReport> =
            kinds().iter().map(|kind| KindReport::new(*kind, &kind.methods())).collect();
        let methods = kinds.iter().flat_map(|kind| &kind.methods).collect();
        let report = AllReport { kinds: &kinds, methods };
        outln!("{}", serde_json::to_string_pretty(&report).map_err(Failure::failed)?);
        return Ok(ExitCode::Done);
    }
    let mut table =
        Table::new(&[("kind", Align::Left), ("what it does", Align::Left), ("methods", Align::Left)]);
    for kind in kinds() {
        let mut methods: Vec<String> = match kind.method_key() {
            Some(_) => kind.methods().iter().map(|method| method.id.to_owned()).collect(),
            None => Vec::new(),
        };
        if methods.len() > LISTED_METHODS {
            let n_more = methods.len() - LISTED_METHODS;
            methods.truncate(LISTED_METHODS);
            methods.push(format!("and {n_more} more"));
        }
        table.row([kind.id().to_owned(), kind.summary().to_owned(), methods.join(", ")]);
    }
    out!("{table}");
    outln!("\n`merganser stages KIND [METHOD]` shows ports, parameters and formulas");
    Ok(ExitCode::Done)
}

/// `stages --json`: as of one kind, the methods of all.
#[derive(Serialize)]
struct AllReport<'a> {
    methods: Vec<&'a MethodReport>,
    kinds: &'a [KindReport],
}

/// `stages KIND --json`.
#[derive(Serialize)]
struct KindReport {
    kind: &'static str,
    summary: &'static str,
    ports: Vec<PortReport>,
    method_key: Option<&'static str>,
    methods: Vec<MethodReport>,
}

#[derive(Serialize)]
struct PortReport {
    name: &'static str,
    doc: &'static str,
    accepts: Vec<&'static str>,
    required: bool,
}

#[derive(Serialize)]
struct MethodReport {
    id: &'static str,
    kind: &'static str,
    summary: &'static str,
    params: Vec<ParamReport>,
    formula: &'static str,
    source: &'static str,
}

#[derive(Serialize)]
struct ParamReport {
    name: String,
    #[serde(rename = "type")]
    type_name: String,
    default: Value,
    required: bool,
    doc: String,
}

impl KindReport {
    fn new(kind: &dyn StageKind, methods: &[MethodDoc]) -> Self {
        Self {
            kind: kind.id(),
            summary: kind.summary(),
            ports: ports(kind).map(PortReport::from).collect(),
            method_key: kind.method_key(),
            methods: methods
                .iter()
                .map(|method| MethodReport {
                    id: method.id,
                    kind: kind.id(),
                    summary: method.summary,
                    params: params(method),
                    formula: method.formula,
                    source: method.source,
                })
                .collect(),
        }
    }
}

impl From<&'static Port> for PortReport {
    fn from(port: &'static Port) -> Self {
        let accepts = port.accepts.iter().map(|content| content.label()).collect();
        Self { name: port.name, doc: port.doc, accepts, required: port.required }
    }
}

fn ports(kind: &dyn StageKind) -> impl Iterator<Item = &'static Port> {
    kind.ports().named.iter()
}

/// Reads the parameters off the JSON Schema of the type that parses them.
fn params(method: &MethodDoc) -> Vec<ParamReport> {
    let schema = method.schema.as_value();
    let mut reports = Vec::new();
    collect_params(schema, schema, "", &mut reports);
    reports
}

/// Lists the properties of a table; tables inside it follow under names such as `dataset.<name>.format` and `rules[].bits`.
fn collect_params(table: &Value, root: &Value, prefix: &str, reports: &mut Vec<ParamReport>) {
    let required: Vec<&str> = table
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let properties = table.get("properties").and_then(Value::as_object);
    for (name, property) in properties.into_iter().flatten() {
        let full_name = format!("{prefix}{name}");
        reports.push(ParamReport {
            name: full_name.clone(),
            type_name: type_name(property, root),
            default: property.get("default").cloned().unwrap_or(Value::Null),
            required: required.contains(&name.as_str()),
            doc: property.get("description").and_then(Value::as_str).unwrap_or_default().replace('\n', " "),
        });
        let inner = [("items", "[]."), ("additionalProperties", ".<name>.")];
        for (keyword, infix) in inner {
            if let Some(inside) =
                property.get(keyword).map(|inside| resolved(inside, root)).filter(|inside| inside.is_object())
            {
                collect_params(inside, root, &format!("{full_name}{infix}"), reports);
            }
        }
    }
}

/// Follows a reference to the schema that it names.
fn resolved<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|reference| reference.rsplit('/').next());
    name.and_then(|name| root.get("$defs")?.get(name)).unwrap_or(schema)
}

/// "integer", "path", "list of tables", "`error` | `skip`": a schema in a word or two.
fn type_name(property: &Value, root: &Value) -> String {
    let property = resolved(property, root);
    if let Some(variants) = property.get("enum").and_then(Value::as_array) {
        return variants
            .iter()
            .filter_map(Value::as_str)
            .map(|name| format!("`{name}`"))
            .collect::<Vec<_>>()
            .join(" | ");
    }
    if let Some(constant) = property.get("const").and_then(Value::as_str) {
        return format!("`{constant}`");
    }
    let alternatives = property.get("anyOf").or_else(|| property.get("oneOf")).and_then(Value::as_array);
    if let Some(alternatives) = alternatives {
        let names =
            alternatives.iter().map(|alternative| type_name(alternative, root)).filter(|name| name != "null");
        return names.collect::<Vec<_>>().join(" | ");
    }
    match property.get("type") {
        Some(Value::String(name)) => one_type(name, property, root),
        Some(Value::Array(names)) => {
            let names = names.iter().filter_map(Value::as_str).filter(|name| *name != "null");
            names.map(|name| one_type(name, property, root)).collect::<Vec<_>>().join(" | ")
        }
        _ => "value".to_owned(),
    }
}

fn one_type(name: &str, property: &Value, root: &Value) -> String {
    match (name, property.get("items"), property.get("format").and_then(Value::as_str)) {
        ("array", Some(items), _) => format!("list of {}", type_name(items, root)),
        ("object", ..) => "table".to_owned(),
        ("string", _, Some(format @ ("path" | "glob"))) => format.to_owned(),
        _ => name.to_owned(),
    }
}

fn overview(kind: &dyn StageKind, methods: &[MethodDoc]) -> String {
    let mut text = format!("{}: {}\n\n", kind.id(), kind.summary());
    text += &port_table(kind);
    let key = kind.method_key().unwrap_or("method");
    let mut table =
        Table::new(&[(key, Align::Left), ("what it does", Align::Left), ("formula", Align::Left)]);
    for method in methods {
        table.row([method.id, method.summary, method.formula].map(str::to_owned));
    }
    let _ = write!(text, "{table}\n`merganser stages {} METHOD` shows the parameters of one\n", kind.id());
    text
}

fn describe(kind: &dyn StageKind, method: &MethodDoc) -> String {
    let title =
        if method.id == kind.id() { kind.id().to_owned() } else { format!("{} · {}", kind.id(), method.id) };
    let mut text =
        format!("{title}: {}\n\n  {}\n\nsource: {}\n\n", method.summary, method.formula, method.source);
    text += &port_table(kind);
    let mut table = Table::new(&[
        ("parameter", Align::Left),
        ("type", Align::Left),
        ("default", Align::Left),
        ("what it is", Align::Left),
    ]);
    for param in params(method) {
        let default = match (&param.default, param.required) {
            (_, true) => "required".to_owned(),
            (Value::Null, false) => "–".to_owned(),
            (value, false) => value.to_string(),
        };
        table.row([param.name, param.type_name, default, param.doc]);
    }
    if !table.is_empty() {
        text += &table.to_string();
    }
    text
}

fn port_table(kind: &dyn StageKind) -> String {
    let mut table = Table::new(&[
        ("port", Align::Left),
        ("takes", Align::Left),
        ("", Align::Left),
        ("what it is", Align::Left),
    ]);
    for port in ports(kind) {
        let takes: Vec<&str> = port.accepts.iter().map(|content: &Content| content.label()).collect();
        let need = if port.required { "required" } else { "optional" };
        table.row([port.name.to_owned(), takes.join(" | "), need.to_owned(), port.doc.to_owned()]);
    }
    if table.is_empty() { String::new() } else { format!("{table}\n") }
}
