"""Copy the picture of the journey of one clip from the run notebook 00 to img/journey.png."""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
cells = json.loads((ROOT / "notebooks" / "00_overview.ipynb").read_text(encoding="utf-8"))["cells"]
pictures = [
    output["data"]["image/png"]
    for cell in cells
    if "wave, picture, attention, words = panels" in "".join(cell["source"])
    for output in cell["outputs"]
    if "image/png" in output.get("data", {})
]
(ROOT / "img" / "journey.png").write_bytes(base64.b64decode(pictures[0]))
