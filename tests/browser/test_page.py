"""The pack in ComfyUI's real web page."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from support import ROOT

pytestmark = pytest.mark.browser

WORKFLOW = ROOT / "example_workflows" / "flux_quantized.json"
OURS = ("LowBitLoadDiffusionModel", "LowBitInspect", "LowBitOffload")
PACK = "/extensions/comfyui-lowbit/"

# As a file that is dropped on the page or opened from its menu.
OPEN = """
const [text, done] = [arguments[0], arguments[arguments.length - 1]];
const file = new File([text], "example.json", { type: "application/json" });
window.app.handleFile(file).then(() => done(""), (error) => done(String(error)));
"""
NODES = """
return window.app.graph.nodes.map((node) => ({
  id: node.id,
  type: node.type,
  known: node.type in LiteGraph.registered_node_types,
  title: node.title,
  values: (node.widgets ?? []).filter((w) => w.serialize !== false).map((w) => w.value),
  images: (node.imgs ?? []).map((image) => [image.naturalWidth, image.naturalHeight]),
  report: node.lowbitReport?.value ?? null,
  links: (node.inputs ?? []).filter((input) => input.link != null).length,
}));
"""


def nodes(page):
    return {node["type"]: node for node in page.execute_script(NODES)}


def open_workflow(page, workflow):
    assert page.execute_async_script(OPEN, json.dumps(workflow)) == ""
    wanted = {node["type"] for node in workflow["nodes"]}
    WebDriverWait(page, 60).until(lambda _: wanted == set(nodes(page)))


def our_complaints(page):
    """What the page's console said at level SEVERE about the pack."""
    return [
        entry["message"]
        for entry in page.get_log("browser")
        if entry["level"] == "SEVERE" and ("lowbit" in entry["message"].lower())
    ]


def keep_picture(page, name):
    """A screenshot beside the test's other output, where one is asked for."""
    if folder := os.environ.get("LOWBIT_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.save_screenshot(str(Path(folder) / f"{name}.png"))


def small(workflow):
    """The example with this server's files and a size for a CPU.

    CLIP-L alone stands for both text encoders: the tiny model takes its 768 channels.
    """
    values = {
        "LowBitLoadDiffusionModel": ["tiny", "auto", "auto", "auto", "auto", "auto"],
        "LowBitInspect": ["tiny", "auto"],
        "VAELoader": ["taef1"],
        "EmptySD3LatentImage": [128, 128, 1],
        "KSampler": [7, "fixed", 2, 1, "euler", "simple", 1],
    }
    for node in workflow["nodes"]:
        if node["type"] == "DualCLIPLoader":
            node.update(
                type="CLIPLoader",
                properties={},
                widgets_values=["clip_l.safetensors", "stable_diffusion", "default"],
                inputs=[],
            )
        node["widgets_values"] = values.get(node["type"], node.get("widgets_values", []))
    return workflow


def test_example_opens_with_every_node_known(page):
    workflow = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    open_workflow(page, workflow)
    shown = nodes(page)
    for node in workflow["nodes"]:
        there = shown[node["type"]]
        assert there["known"], there
        assert there["values"] == node.get("widgets_values", []), there
        given = [item for item in node["inputs"] if item["link"] is not None]
        assert there["links"] == len(given), there
    assert shown["LowBitLoadDiffusionModel"]["title"] == "Load Quantized Diffusion Model"
    text = page.find_element(By.TAG_NAME, "body").text.lower()
    assert "missing node" not in text and "not found" not in text
    keep_picture(page, "example")
    assert our_complaints(page) == []


def fetch(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def test_help_pages_scripts_and_example_are_served(server, page):
    listed = server.get("/extensions")
    ours = [path for path in listed if path.startswith(PACK)]
    assert ours == [f"{PACK}js/report_text.js"]  # each script once
    for name in OURS:
        text = fetch(f"{server.url}{PACK}docs/{name}.md").decode()
        assert text.startswith("# ") and text == (ROOT / f"web/docs/{name}.md").read_text("utf-8")
    assert server.get("/workflow_templates")["comfyui-lowbit"] == [WORKFLOW.stem]
    templates = f"{server.url}/api/workflow_templates/comfyui-lowbit"
    assert json.loads(fetch(f"{templates}/{WORKFLOW.name}"))["version"] == 0.4
    assert fetch(f"{templates}/{WORKFLOW.stem}.jpg")[:3] == b"\xff\xd8\xff"


def test_run_button_gives_the_image_and_the_report(server, page):
    workflow = small(json.loads(WORKFLOW.read_text(encoding="utf-8")))
    open_workflow(page, workflow)
    before = set(server.get("/history"))
    run = page.find_element(By.CSS_SELECTOR, "[data-testid='queue-button']")
    assert run.text.strip() == "Run"
    run.click()
    WebDriverWait(page, 240, 0.5).until(lambda _: set(server.get("/history")) - before)
    (new,) = set(server.get("/history")) - before
    entry = server.get(f"/history/{new}")[new]
    assert entry["status"]["status_str"] == "success", entry["status"]

    WebDriverWait(page, 60).until(lambda _: nodes(page)["SaveImage"]["images"])
    shown = nodes(page)
    assert shown["SaveImage"]["images"] == [[128, 128]]
    assert "scheme: sdnq" in shown["LowBitInspect"]["report"]
    # the report is not saved with it
    assert shown["LowBitInspect"]["values"] == ["tiny", "auto", "auto", 0, "auto", "auto"]
    (item,) = entry["outputs"]["12"]["images"]
    assert (server.base / "output" / item["filename"]).stat().st_size > 1000
    keep_picture(page, "run")
    assert our_complaints(page) == []


def test_offload_node_has_its_widgets_and_a_panel(page):
    found = page.execute_script("""
const node = LiteGraph.createNode("LowBitOffload");
window.app.graph.add(node);
return { title: node.title, panel: node.lowbitReport !== undefined,
  values: node.widgets.filter((w) => w.serialize !== false).map((w) => [w.name, w.value]) };
""")
    assert found == {
        "title": "Set Offload Mode",
        "panel": True,
        "values": [["mode", "auto"], ["vram_budget_gb", 0], ["blocks_on_gpu", 0]],
    }
    assert our_complaints(page) == []
