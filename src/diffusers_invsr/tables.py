"""Markdown tables."""


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of `rows`, lists of cells as long as `headings`, without a trailing line break."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [headings, *rows]]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
