"""Tables in Markdown."""


def markdown_table(headings: list[str], rows: list[list[str]]) -> str:
    """A table of texts, without a line break at its end."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [headings, *rows]]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
