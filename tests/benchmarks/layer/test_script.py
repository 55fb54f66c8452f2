"""A script runs the sections asked for, goes on after one that fails, and does not pass wrong numbers."""

import pytest

from benchmarks.layer.script import is_wrong, run_script


def run(tmp_path, sections, *arguments):
    command = ["--device", "cpu", "--quick", "--output-dir", str(tmp_path), *arguments]
    return run_script("toy", "A toy", None, sections, command)


def table(name, **row):
    return lambda context: context.report.table(name, [row])


def test_the_sections_asked_for_are_run(tmp_path):
    sections = {"cpu": {"one": table("One", M=1, error=1e-7), "two": table("Two", M=2)}}
    text = run(tmp_path, sections).read_text()
    assert "## One" in text and "## Two" in text and "copy bandwidth" in text
    text = run(tmp_path, sections, "--sections", "two").read_text()
    assert "## One" not in text and "## Two" in text and "Wrong results" not in text


def test_a_section_that_fails_does_not_stop_the_others(tmp_path, capsys):
    def broken(context):
        raise RuntimeError("no kernel")

    with pytest.raises(SystemExit, match="failed sections: bad"):
        run(tmp_path, {"cpu": {"bad": broken, "good": table("Good", M=1)}})
    text = next(tmp_path.glob("*.md")).read_text()
    assert "**Section bad failed:** RuntimeError: no kernel" in text and "## Good" in text
    assert "no kernel" in capsys.readouterr().err


def test_a_wrong_result_is_listed_and_fails_the_run(tmp_path):
    with pytest.raises(SystemExit, match="1 wrong result"):
        run(tmp_path, {"cpu": {"one": table("One", M=1, error=0.6)}})
    assert "Wrong results" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(("error", "wrong"), [(1e-3, False), (0.1, True), (float("nan"), True)])
@pytest.mark.parametrize("column", ["error", "error x", "bfloat16 error"])
def test_what_counts_as_wrong(column, error, wrong):
    assert is_wrong({column: error, "ours x": 3.0}) is wrong
    assert not is_wrong({column: None, "ours x": 3.0})


def test_what_only_the_other_device_has_is_refused(tmp_path, capsys):
    sections = {"cpu": {"one": table("One", M=1)}, "cuda": {"two": table("Two", M=2)}}
    with pytest.raises(SystemExit):
        run(tmp_path, sections, "--sections", "two")
    assert "cpu has no section two; it has one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, {"cuda": sections["cuda"]})
    assert "toy has nothing to measure on cpu: pass --device cuda" in capsys.readouterr().err
