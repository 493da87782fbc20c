"""Tables of results as text: for Markdown and the console, whatever columns there are."""

import re

import pandas as pd


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """Numbers as text: accuracies with one decimal, weights with two, a dash for none."""

    def cell(column: str, value: float | None) -> str:
        if pd.isna(value):
            return "-"
        decimals = 0 if column == "images" else 2 if column in weight_columns(table) else 1
        return f"{value:.{decimals}f}"

    return pd.DataFrame({column: [cell(column, v) for v in table[column]] for column in table}, index=table.index)


def weight_columns(table: pd.DataFrame) -> list[str]:
    """The columns of expert weights: w1, w2, ..."""
    return [column for column in table if re.fullmatch(r"w\d+", column)]


def markdown_lines(text: pd.DataFrame, index: str) -> str:
    """A table of text in Markdown; `index` heads its first column."""
    text = text.rename_axis(index, axis=0).reset_index()
    lines = [list(text.columns), ["---"] + ["---:"] * (len(text.columns) - 1), *text.values.tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    return markdown_lines(format_table(table), "distribution")


def console_table(table: pd.DataFrame) -> str:
    return format_table(table).to_string()
