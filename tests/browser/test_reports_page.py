"""Reports on the real web page: text on the nodes, charts as pictures, a help page of each."""

from __future__ import annotations

import json
import urllib.request

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from support import ROOT
from test_page import PACK, keep_picture, nodes, our_complaints

pytestmark = pytest.mark.browser

#: Makes nodes as a user does from the menu, links them, and sets widgets by name.
BUILD = """
const [made, links] = arguments;
app = window.app;
app.graph.clear();
const there = {};
let x = 40;
for (const [name, [type, widgets]] of Object.entries(made)) {
  const node = LiteGraph.createNode(type);
  node.pos = [x, 80];
  x += 420;
  app.graph.add(node);
  there[name] = node;
  for (const [key, value] of Object.entries(widgets)) {
    node.widgets.find((w) => w.name === key).value = value;
  }
}
for (const [from, output, to, input] of links) {
  const slot = there[to].inputs.findIndex((i) => i.name === input);
  if (slot < 0) throw new Error(`${to} has no input ${input}`);
  there[from].connect(output, there[to], slot);
}
return Object.keys(there).length;
"""
MADE = {
    "loader": ["LowBitLoadDiffusionModel", {"model": "tiny", "matmul": "dequantize"}],
    "report": ["LowBitModelReport", {"lora": "none"}],
    "show": ["LowBitShowReport", {"show": "json", "width": 640}],
    "picture": ["PreviewImage", {}],
}
LINKS = [
    ["loader", 0, "report", "model"],
    ["report", 0, "show", "report"],
    ["show", 1, "picture", "images"],
]


def test_reports_are_shown_on_their_nodes(server, page):
    assert page.execute_script(BUILD, MADE, LINKS) == len(MADE)
    before = set(server.get("/history"))
    page.find_element(By.CSS_SELECTOR, "[data-testid='queue-button']").click()
    WebDriverWait(page, 120, 0.5).until(lambda _: set(server.get("/history")) - before)
    (new,) = set(server.get("/history")) - before
    entry = server.get(f"/history/{new}")[new]
    assert entry["status"]["status_str"] == "success", entry["status"]

    WebDriverWait(page, 60).until(lambda _: nodes(page)["PreviewImage"]["images"])
    shown = nodes(page)
    assert "kernels on" in shown["LowBitModelReport"]["report"]
    assert json.loads(shown["LowBitShowReport"]["report"])["kind"] == "model"
    assert shown["PreviewImage"]["images"][0][0] == 640
    # neither text is saved with the workflow
    assert shown["LowBitModelReport"]["values"] == ["none"]
    assert shown["LowBitShowReport"]["values"] == ["json", 640]
    keep_picture(page, "reports")
    assert our_complaints(page) == []


def test_every_node_has_its_help_page(server, page):
    ours = [name for name in server.get("/object_info") if name.startswith("LowBit")]
    assert len(ours) >= 6
    for name in ours:
        with urllib.request.urlopen(f"{server.url}{PACK}docs/{name}.md", timeout=30) as answer:
            text = answer.read().decode()
        assert text.startswith("# ") and text == (ROOT / f"web/docs/{name}.md").read_text("utf-8")
        told = server.get(f"/object_info/{name}")[name]
        assert text.splitlines()[0] == f"# {told['display_name']}"
        for kind in ("required", "optional"):
            for key in told["input"].get(kind, {}):
                assert key in text, f"{name}: the page does not tell of {key}"
