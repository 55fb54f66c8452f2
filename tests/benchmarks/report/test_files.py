"""What a run leaves: Markdown, CSV, pictures."""

import csv

from benchmarks.report.files import RESULTS, Report
from benchmarks.report.picture import pyplot


def test_a_report_writes_markdown_csv_and_pictures(tmp_path, capsys):
    report = Report("demo", "A demo", "cpu", directory=tmp_path, label="My Label")
    report.table("First", [{"M": 1, "speed": 2.0}], note="A note.")
    report.table("Second", [{"M": 2, "error": 0.5, "hidden": 1}], columns=["M", "error"])
    figure, _ = pyplot().subplots()
    picture = report.figure(figure, "curve", "A caption")
    path = report.write()
    assert path.name.endswith("_my-label.md") and "_demo_cpu_" in path.name
    text = path.read_text()
    assert "torch" in text and "A note." in text and f"![A caption]({picture.name})" in text
    assert "hidden" not in text
    with path.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["section"] for row in rows] == ["First", "Second"]
    assert rows[1]["hidden"] == "1" and rows[0]["hidden"] == ""
    assert picture.stat().st_size > 0
    assert "## First" in capsys.readouterr().out


def test_results_go_beside_those_that_are_there():
    assert (RESULTS / "README.md").is_file()
    assert Report("demo", "A demo", "cpu").directory == RESULTS
