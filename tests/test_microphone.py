"""The microphone of chapters 17 and 18 in a real browser: Chromium with a fake microphone."""

import time
from itertools import pairwise

import jiwer
import nbformat
import pytest
import soundfile
from lab import ROOT, chromium, jupyterlab, needs_browser, run_all, wait

from utils.audio import SAMPLE_RATE, load_audio, pad_or_trim
from utils.data import clean_text, load_clips

pytestmark = needs_browser
BUTTONS = {"17_transcription": "button.microphone", "18_streaming": "button.speak"}
RECORD = """
const place = document.querySelector(".growing");
window.shown = [];
const note = () => {
  const [all, unsure] = ["pre", "pre span"].map((s) => place.querySelector(s)?.textContent ?? "");
  window.shown.push([all.slice(0, all.length - unsure.length), unsure]);
};
new MutationObserver(note).observe(place, { childList: true, subtree: true });
"""


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A WAV file with a clip of a voice of the training data, and its words."""
    row = load_clips("corpus", "test_seen_voices")[3]
    path, audio = tmp_path_factory.mktemp("sound") / "spoken.wav", load_audio(row["audio"]["bytes"])
    soundfile.write(path, pad_or_trim(audio, len(audio) + SAMPLE_RATE).numpy(), SAMPLE_RATE)
    return path, clean_text(row["text"])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab with notebooks of the tagged cells alone, and how many of them are code."""
    folder, cells = tmp_path_factory.mktemp("lab"), {}
    for name in BUTTONS:
        chapter = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
        chapter.cells = [c for c in chapter.cells if "microphone" in c.metadata.get("tags", [])]
        cells[name] = sum(c.cell_type == "code" for c in chapter.cells)
        assert cells[name] > 2
        nbformat.write(chapter, folder / f"{name}.ipynb")
    with jupyterlab(folder) as lab:
        yield lab, cells


@pytest.fixture
def browser(lab, spoken, request):
    """Chromium whose microphone plays the clip; a chapter's notebook is open and has been run."""
    flags = (
        "disable-gpu",
        "window-size=1200,2400",
        "use-fake-device-for-media-stream",
        "use-fake-ui-for-media-stream",
        f"use-file-for-fake-audio-capture={spoken[0]}%noloop",
    )
    name = getattr(request, "param", "17_transcription")
    with chromium(*flags) as driver:
        server, cells = lab
        driver.get(server.page(f"{name}.ipynb"))
        run_all(driver, cells[name])
        wait(driver, lambda d: d.find_elements("css selector", BUTTONS[name]), "the button")
        yield driver
    server.stop_kernels()  # the next one counts its cells from 1


def transcript(driver):
    found = driver.find_elements("css selector", ".transcript .widget-html-content")
    return found and found[0].text


def test_the_microphone_is_transcribed(browser, spoken):
    path, text = spoken
    browser.find_element("css selector", "button.microphone").click()

    def label():
        return browser.find_element("css selector", "button.microphone").text

    wait(browser, lambda _: label() == "Stop", "the recording", 20)
    time.sleep(soundfile.info(path).duration + 1)
    browser.find_element("css selector", "button.microphone").click()
    said = wait(browser, transcript, "a transcript of the microphone")
    assert label() == "Record" and jiwer.wer(text, said) <= 0.5, f"{said!r} is not {text!r}"
    assert browser.find_elements("css selector", "img.widget-image")[0].size["height"] > 100


def test_an_upload_is_transcribed(browser, spoken, tmp_path):
    path, text = spoken
    show = "HTMLInputElement.prototype.click = function () { document.body.append(this); };"
    browser.execute_script(show)  # instead of the system's window, which nobody could operate
    browser.find_element("css selector", "button.jupyter-widgets.widget-upload").click()
    field = wait(browser, lambda d: d.find_elements("css selector", "[type=file]"), "the field")[0]
    field.send_keys(str(path))
    said = wait(browser, transcript, "a transcript of the upload")
    assert jiwer.wer(text, said) <= 0.34, f"{said!r} is not {text!r}"
    (tmp_path / "no.wav").write_text("no sound")
    field.send_keys(str(tmp_path / "no.wav"))
    wait(browser, lambda d: "cannot be decoded" in transcript(d), "a clear refusal", 30)


@pytest.mark.parametrize("browser", ["18_streaming"], indirect=True)
def test_text_grows_while_somebody_speaks(browser, spoken):
    _, text = spoken
    button = browser.find_element("css selector", BUTTONS["18_streaming"])
    browser.execute_script(RECORD)
    button.click()

    def finals(driver):
        return [final for final, _ in driver.execute_script("return shown") if final.strip()]

    wait(browser, finals, "final text while the microphone is on", 60)
    assert button.text == "Stop"
    button.click()
    wait(browser, lambda _: button.text == "Speak", "the end of the recording", 20)
    wait(browser, lambda d: d.execute_script("return shown")[-1][1] == "", "no unsure text", 30)
    shown, said = browser.execute_script("return shown"), finals(browser)
    assert any(unsure for _, unsure in shown), "nothing was shown before it was final"
    assert all(b.startswith(a) for a, b in pairwise(said)), "final text has changed"
    assert jiwer.wer(text, said[-1]) <= 0.5, f"{said[-1]!r} is not {text!r}"
