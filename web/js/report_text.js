// Shows the text of a report on the node that made it. ComfyUI's page shows such text for nodes of
// its own only.
import { app } from "../../../scripts/app.js";

const NODES = [
  "LowBitInspect",
  "LowBitOffload",
  "LowBitModelReport",
  "LowBitShowReport",
  "LowBitCompare",
  "LowBitQuantize",
  "LowBitQuantizeFile",
  "LowBitSave",
  "LowBitRecipeSDNQ",
  "LowBitRecipeSVDQuant",
  "LowBitRecipeFP8",
  "LowBitRecipeNVFP4",
  "LowBitRecipeINT8",
  "LowBitRecipeFromText",
];

function addPanel(node) {
  const panel = document.createElement("textarea");
  panel.readOnly = true;
  panel.spellcheck = false;
  panel.className = "comfy-multiline-input";
  panel.style.fontFamily = "monospace";
  panel.style.whiteSpace = "pre-wrap";
  panel.placeholder = "Run the workflow to see the report.";
  const widget = node.addDOMWidget("report", "report", panel, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => 120,
    getValue: () => panel.value,
    setValue: (text) => {
      panel.value = text ?? "";
    },
  });
  widget.serialize = false; // neither in the prompt nor in the workflow file
  node.lowbitReport = widget;
}

app.registerExtension({
  name: "LowBit.ReportText",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addPanel(node);
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      this.lowbitReport.value = [output.text].flat().join("\n");
    };
  },
});
