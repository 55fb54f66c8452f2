"""Tables as text."""

import math

import expecttest

from benchmarks.report.table import format_cell, markdown_table


class TestText(expecttest.TestCase):
    def test_markdown_table(self):
        rows = [{"layer": "a|b", "speed": 12.345, "error": 2.5e-7}, {"layer": "c", "speed": None}]
        self.assertExpectedInline(
            markdown_table(rows),
            """\
| layer | speed |   error |
| ----- | ----: | ------: |
| a\\|b  |  12.3 | 2.5e-07 |
| c     |     - |         |""",
        )

    def test_format_cell(self):
        values = [None, True, 0.0, 1.2345, 123.4, 1e-5, 2e7, math.nan, "x", 7]
        text = " ".join(format_cell(value) for value in values)
        self.assertExpectedInline(text, """- yes 0 1.23 123 1.0e-05 2.0e+07 nan x 7""")
