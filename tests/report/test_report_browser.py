"""The trace browser: nothing in a row can become markup or script,
what may offend is hidden, filters work."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlbf_jax.report import browser as report_browser
from rlbf_jax.report import document as report
from rlbf_jax.report.browser import (
    ERASED,
    FORCED,
    HIDDEN,
    MOST_ROWS,
    browser,
    cut,
    embedded_json,
    entry,
)
from tests.report_runs import made_up_row, write_run

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<!--<script>",
    "]]>\"'`\\",
    "\u2028\u2029\x00\x1b[2J",
    "\ud800 half a pair",
    "<img src=x onerror=\"document.title='owned'\">",
]
CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        ),
    ),
    None,
)


class Scripts(HTMLParser):
    """What a browser's parser takes for scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.inside = [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "script":
            self.found.append([dict(attrs), ""])

    def handle_data(self, data):
        if self.inside == "script":
            self.found[-1][1] += data

    def handle_endtag(self, tag):
        self.inside = None


def hostile_row(text, **more):
    row = made_up_row(
        prompt=text, visible=text, category=text, split=text, attack=text, request_id=text, **more
    )
    row["trace"] = [
        dict(piece, text=text) if piece["kind"] == "content" else piece for piece in row["trace"]
    ]
    row["verdict"] = {"judged": False, "reason": text}
    return row


@given(
    st.recursive(
        st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_json_survives_and_cannot_end_its_element(data):
    plain = embedded_json(data)
    assert json.loads(plain) == data
    assert not set("<>&\u2028\u2029") & set(plain)


def test_hostile_text_stays_text(tmp_path):
    write_run(tmp_path, [hostile_row(text) for text in HOSTILE])
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_bytes().decode()
    data, script = Scripts(page).found
    assert data[0] == {"type": "application/json", "id": "trace-data"} and script[0] == {}
    rows = json.loads(data[1])["rows"]
    assert {row["prompt"] for row in rows} == {text.replace("\ud800", "?") for text in HOSTILE}
    assert "<img src=x" not in page and "innerHTML" not in script[1]
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_page_without_rows_has_no_script(tmp_path):
    write_run(tmp_path, [])
    report.write_report(tmp_path)
    assert not Scripts((tmp_path / "report.html").read_text()).found
    assert browser({"rlbf": []}) is None


def test_what_may_offend_is_hidden():
    row = made_up_row()
    kinds = [kind for _, kind in entry("rlbf", row)["text"]]
    assert kinds[:3] == [FORCED, FORCED | ERASED | HIDDEN, ERASED | HIDDEN]
    assert not any(kind & HIDDEN for kind in kinds[3:])
    # A span of the visible text is found again in the pieces of the trace,
    # on both sides of what was erased.
    visible = row["visible"]
    start = visible.index("kitchen")
    bad = dict(
        row,
        verdict={"judged": True, "safe": False, "spans": [[start, start + 20, "privacy", True]]},
    )
    told = entry("rlbf", bad)
    assert [t for t, kind in told["text"] if kind & HIDDEN and not kind & ERASED] == [
        "kitchen.",
        " Let the dou",
    ]
    assert [t for t, kind in told["reads"] if kind & HIDDEN] == [visible[start : start + 20]]
    leak = dict(
        row, verdict={"judged": True, "safe": True, "leaks": 1, "leak_spans": [[0, 5, "privacy"]]}
    )
    assert [t for t, kind in entry("rlbf", leak)["reads"] if kind] == ["Bread"]


@pytest.mark.parametrize(
    "verdict",
    [
        {},
        {"judged": False},
        {"judged": True, "safe": False},
        {"judged": True, "safe": True, "leaks": 2},
    ],
)
def test_where_nobody_can_tell_where_everything_is_hidden(verdict):
    told = entry("rlbf", made_up_row(verdict=verdict))
    assert all(kind & HIDDEN for text, kind in told["reads"])
    assert all(kind & HIDDEN for text, kind in told["text"] if not text.startswith("["))


def test_pieces_that_do_not_join_to_the_visible_text_are_hidden_if_anything_is():
    row = made_up_row(
        visible="Other words", verdict={"judged": True, "safe": False, "spans": [[0, 5, "x", True]]}
    )
    assert all(
        kind & HIDDEN for text, kind in entry("rlbf", row)["text"] if not text.startswith("[")
    )
    row["verdict"] = {"judged": True, "safe": True, "spans": []}
    assert not any(kind & HIDDEN and not kind & ERASED for _, kind in entry("rlbf", row)["text"])


@given(
    st.text(max_size=12), st.lists(st.tuples(st.integers(-9, 20), st.integers(-9, 20)), max_size=3)
)
def test_cut_covers_the_text_once(text, spans):
    pieces = cut(text, spans)
    assert "".join(piece for piece, _ in pieces) == text
    hidden = [flag for piece, flag in pieces for _ in piece]
    assert hidden == [any(a <= i < b for a, b in spans) for i in range(len(text))]
    assert all(a[1] != b[1] for a, b in zip(pieces, pieces[1:], strict=False))


def test_the_cap_is_a_cap_and_is_told(tmp_path):
    rows = [
        made_up_row(prompt_id=str(i), split=("sft", "rl")[i % 2]) for i in range(MOST_ROWS + 30)
    ]
    rows += [made_up_row(verdict={"judged": False}), made_up_row(attack="direct", split="all")]
    found = browser({"rlbf": rows})
    assert (found.shown, found.total, found.cap) == (MOST_ROWS + 2, len(rows), MOST_ROWS)
    splits = [
        row["split"] for row in json.loads(found.data)["rows"] if row["attack"] == "middle_filling"
    ]
    assert abs(splits.count("sft") - splits.count("rl")) <= 1
    small = browser({"rlbf": rows}, most_bytes=6000)
    assert small.cap < MOST_ROWS and len(small.data) < 6500
    write_run(tmp_path, rows)
    report.write_report(tmp_path)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert (
        f"{MOST_ROWS + 2} of {len(rows)} rows: the first {MOST_ROWS} of each stage, attack and "
        "verdict" in page
    )
    assert "The other 30 are left out; all are in evaluation/rlbf.jsonl" in page


def test_attack_commands_and_benchmarks_keep_the_caps():
    own = [made_up_row(prompt_id=str(i)) for i in range(MOST_ROWS + 5)]
    asked = [
        made_up_row(prompt_id=f"a{i}", prompt="asked", asked="rlbf attack")
        for i in range(MOST_ROWS)
    ]
    benchmark = [made_up_row(benchmark="advbench") for _ in range(MOST_ROWS + 5)]
    found = browser({"rlbf": [*own, *asked, *benchmark]})
    assert found.shown == 2 * MOST_ROWS
    rows = json.loads(found.data)["rows"]
    assert [row["attack"] for row in rows].count("middle_filling, advbench") == MOST_ROWS
    assert [row["prompt"] for row in rows].count("asked") == MOST_ROWS // 2


def test_verdicts_and_directives_of_rows():
    rows = [
        made_up_row(),
        made_up_row(verdict={}),
        made_up_row(verdict={"judged": True, "safe": False}),
    ]
    assert [report_browser.verdict_of(row) for row in rows] == ["safe", "unjudged", "unsafe"]
    plain = made_up_row(
        trace=[{"text": "Yes.", "kind": "content", "erased": False, "forced": False}],
        visible="Yes.",
    )
    assert entry("sft", plain)["directive"] is False and entry("sft", plain)["reads"] == []
    assert entry("sft", rows[0])["directive"] is True


PROBE = """<script>(function () {
const form = document.getElementById("trace-filters"), told = {};
const shown = function () { return document.querySelectorAll("#trace-rows article").length; };
function set(name, value) {
  form.elements[name].value = value;
  form.elements[name].dispatchEvent(new Event("input", { bubbles: true }));
}
told.start = shown();
set("attack", "=prefilling"); told.prefilling = shown();
set("verdict", "=unsafe"); told.unsafe_prefilling = shown();
set("attack", ""); told.unsafe = shown();
set("verdict", "=unjudged"); told.unjudged = shown();
set("verdict", ""); set("words", "HOSTILE onerror"); told.words = shown();
const veil = document.querySelector(".veil");
const blur = function () { return getComputedStyle(veil.firstChild).filter; };
told.before = blur();
veil.focus(); told.focused = document.activeElement === veil;
veil.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", bubbles: true, cancelable: true }));
told.entered = blur();
veil.click(); told.again = blur();
form.elements.reveal.click(); told.revealed = blur();
set("words", "nothing has these words"); told.none = shown();
set("words", ""); set("directive", "=without"); told.without = shown();
told.images = document.querySelectorAll("#trace-rows img, #trace-rows script").length;
told.title = document.title;
document.title = "told " + JSON.stringify(told);
})();</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")
def test_in_a_browser(tmp_path):
    bad = {"safe": False, "spans": [[3, 9, "insult", True]], "judged": True}
    plain = [{"text": "Yes.", "kind": "content", "erased": False, "forced": False}]
    rows = [
        made_up_row(attack="prefilling"),
        made_up_row(attack="prefilling", verdict=bad),
        made_up_row(verdict=bad),
    ]
    rows += [made_up_row(trace=plain, visible="Yes.")]
    rows += [hostile_row("hostile " + text) for text in HOSTILE]
    write_run(tmp_path, rows)
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_bytes().decode()
    # The page's policy lets no script run but its own; the probe is a second one.
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(page)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    said = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "probed.html").as_uri()],
        capture_output=True,
        timeout=120,
    )
    title = re.search(r"<title>told (.*?)</title>", said.stdout.decode())
    assert title, said.stderr.decode()[-2000:]
    told = json.loads(title[1].replace("&amp;", "&"))
    assert told.pop("before") == told.pop("again") == "blur(5px)"
    assert told == {
        "start": len(rows),
        "prefilling": 2,
        "unsafe_prefilling": 1,
        "unsafe": 2,
        "unjudged": len(HOSTILE),
        "words": 1,
        "focused": True,
        "entered": "none",
        "revealed": "none",
        "none": 0,
        "without": 1,
        "images": 0,
        "title": f"{tmp_path.name}: report",
    }
