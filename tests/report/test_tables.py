"""Tables are Markdown, and stand between markers."""

import pandas as pd
import pytest

from ldae.report.tables import fill, markdown


def test_cells_of_every_kind():
    table = pd.DataFrame({"name": ["a|b", None], "count": [3, 12], "part": [0.25, None], "text": ["1.0 ± 0.5", "x"]})
    assert markdown(table).splitlines() == [
        "| name | count | part | text |",
        "| --- | ---: | ---: | ---: |",
        r"| a\|b | 3 | 0.2 | 1.0 ± 0.5 |",
        "| – | 12 | – | x |",
    ]
    assert markdown([{"name": "a", "count": 3}, {"name": "b", "count": None}]).splitlines()[2:] == [
        "| a | 3 |",
        "| b | – |",
    ]
    assert markdown(table, left=("name", "text")).splitlines()[1] == "| --- | ---: | ---: | --- |"


def test_text_between_markers_is_replaced(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("before\n<!-- t -->\nold\n<!-- t -->\nafter\n<!-- other -->\n")
    fill(path, "t", "| new |")
    assert path.read_text() == "before\n<!-- t -->\n| new |\n<!-- t -->\nafter\n<!-- other -->\n"
    for marker, count in (("other", 1), ("none", 0)):
        with pytest.raises(ValueError, match=f"must hold the line '<!-- {marker} -->' twice, got it {count} times"):
            fill(path, marker, "")
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*none\.md: give one that holds the line '<!-- t -->'"
    ):
        fill(tmp_path / "none.md", "t", "")
