//! Plain text tables: aligned columns, no boxes, readable when piped.

use std::fmt;

/// How a column is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Rows under a header.
pub struct Table {
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<S: ToString>(columns: &[(S, Align)]) -> Self {
        Self {
            columns: columns.iter().map(|(name, align)| (name.to_string(), *align)).collect(),
            rows: Vec::new(),
        }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header: Vec<String> = self.columns.iter().map(|(name, _)| name.clone()).collect();
        let all: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let width_of = |column: usize| {
            all.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
        };
        let widths: Vec<usize> =
            (0..self.columns.len()).map(|column| width_of(column).unwrap_or(0)).collect();
        for row in all {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths.get(column).copied().unwrap_or(0);
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                let right = self.columns.get(column).is_some_and(|(_, align)| *align == Align::Right);
                if column > 0 {
                    line.push_str("  ");
                }
                line += &if right { format!("{padding}{cell}") } else { format!("{cell}{padding}") };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligns_columns_by_characters_and_leaves_no_trailing_blanks() {
        let mut table = Table::new(&[("model", Align::Left), ("bytes", Align::Right), ("note", Align::Left)]);
        table.row(["base · a".to_owned(), "1.0 MB".to_owned(), String::new()]);
        table.row(["b".to_owned(), "12 B".to_owned(), "x".to_owned()]);
        assert_eq!(table.to_string(), "model      bytes  note\nbase · a  1.0 MB\nb           12 B  x\n");
    }
}
