"""Prose with punctuation, spoken by flite: what chapter 19 may make a model forget.

    python data/prose.py    # writes data/prose/test.parquet; needs Debian's package flite

The text is the beginning of Lewis Carroll's "Alice's Adventures in Wonderland" (1865), in the
public domain. The voices were made from recordings of three people.
"""

import io
import tempfile
from pathlib import Path

import datasets
import soundfile
from voices import SAMPLE_RATE, TRAIN_HUMAN, Request, Speaker, say

PASSAGES = [
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having "
    "nothing to do. Once or twice she had peeped into the book her sister was reading, but it had "
    "no pictures or conversations in it.",
    "So she was considering in her own mind, as well as she could, for the hot day made her feel "
    "very sleepy and stupid, whether the pleasure of making a daisy chain would be worth the "
    "trouble of getting up and picking the daisies, when suddenly a white rabbit ran close by her.",
    "There was nothing so very remarkable in that, nor did Alice think it so very much out of the "
    "way to hear the rabbit say to itself that it would be late. But when the rabbit actually took "
    "a watch out of its pocket, and looked at it, and then hurried on, Alice started to her feet.",
    "Burning with curiosity, she ran across the field after it, and fortunately was just in time "
    "to see it pop down a large hole under the hedge. In another moment down went Alice after it, "
    "never once considering how in the world she was to get out again.",
    "The hole went straight on like a tunnel for some way, and then dipped suddenly down, so "
    "suddenly that Alice had not a moment to think about stopping herself before she found herself "
    "falling down a very deep well.",
    "Either the well was very deep, or she fell very slowly, for she had plenty of time as she "
    "went down to look about her, and to wonder what was going to happen next. First, she tried to "
    "look down and make out what she was coming to, but it was too dark to see anything.",
    "Then she looked at the sides of the well, and noticed that they were filled with cupboards "
    "and shelves. Here and there she saw maps and pictures hung upon pegs. She took down a jar "
    "from one of the shelves as she passed, but to her great disappointment it was empty.",
    "She did not like to drop the jar for fear of killing somebody underneath, so she managed to "
    "put it into one of the cupboards as she fell past it. Well, thought Alice to herself, after "
    "such a fall as this, I shall think nothing of tumbling down stairs!",
    "How brave they will all think me at home! Down, down, down. Would the fall never come to an "
    "end? I wonder how many miles I have fallen by this time, she said aloud. I must be getting "
    "somewhere near the centre of the earth.",
]


def main():
    wanted = ("rms", "awb", "slt")
    voices = {voice.name: voice for voice in TRAIN_HUMAN if voice.name in wanted}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for i, text in enumerate(PASSAGES):
            speaker, file = Speaker(voices[wanted[i % 3]], 1.0, 1.0, 1.0), io.BytesIO()
            [audio] = say(speaker, [Request(text)], Path(folder))
            soundfile.write(file, audio, SAMPLE_RATE, format="OGG", subtype="OPUS")
            sound = {"bytes": file.getvalue(), "path": f"{i}.ogg"}
            rows.append({"speaker": speaker.id, "text": text, "audio": sound})
    datasets.Dataset.from_list(rows).to_parquet(Path(__file__).parent / "prose" / "test.parquet")


if __name__ == "__main__":
    main()
