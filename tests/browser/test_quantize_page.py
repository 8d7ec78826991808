"""Quantizing on the real web page: the bar and the layer's name while it runs, the report after."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from test_page import keep_picture, nodes, our_complaints
from test_reports_page import BUILD

pytestmark = pytest.mark.browser

MADE = {
    "recipe": [
        "LowBitRecipeSDNQ",
        {"weights_dtype": "uint4", "use_svd": True, "svd_steps": 100, "scale_search": 20},
    ],
    "file": ["LowBitQuantizeFile", {"model": "exact.safetensors"}],
    "picture": ["PreviewImage", {}],
}
LINKS = [["recipe", 0, "file", "recipe"], ["file", 2, "picture", "images"]]

# What the node shows while it runs: its bar, from 0 to 1, and the text under it.
SHOWN = """
const node = window.app.graph.nodes.find((n) => n.type === "LowBitQuantizeFile");
const texts = (node.widgets ?? []).map((w) => String(w.value ?? ""));
return { progress: node.progress ?? 0, text: texts.find((t) => t.includes(" layers")) ?? "" };
"""


def test_progress_is_on_the_page_and_the_report_after(server, page):
    assert page.execute_script(BUILD, MADE, LINKS) == len(MADE)
    before = set(server.get("/history"))
    page.find_element(By.CSS_SELECTOR, "[data-testid='queue-button']").click()
    seen = []

    def working(_):
        shown = page.execute_script(SHOWN)
        if 0 < shown["progress"] < 1 and "of 58 layers: " in shown["text"]:
            seen.append(shown)
        return len(seen) >= 2 and seen[-1]["text"] != seen[0]["text"]

    WebDriverWait(page, 120, 0.05).until(working)
    assert "blocks." in seen[0]["text"] or "_in" in seen[0]["text"], seen[0]
    keep_picture(page, "quantizing")
    WebDriverWait(page, 240, 0.5).until(lambda _: set(server.get("/history")) - before)
    (new,) = set(server.get("/history")) - before
    assert server.get(f"/history/{new}")[new]["status"]["status_str"] == "success"
    WebDriverWait(page, 60).until(lambda _: nodes(page)["PreviewImage"]["images"])
    shown = nodes(page)
    assert "times smaller" in shown["LowBitQuantizeFile"]["report"]
    assert "SDNQ, " in shown["LowBitRecipeSDNQ"]["report"]
    values = shown["LowBitRecipeSDNQ"]["values"]
    assert values[0] == "uint4" and values[2] is True
    keep_picture(page, "quantized")
    assert our_complaints(page) == []
