"""Prints the tables of the data card, measured on the Parquet files: `python data/describe.py`."""

import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
from grammar import DIGITS, SPLITS


def words_of(text: str) -> list[str]:
    return [token for token in text.split() if not token.startswith("<")]


def source(speaker: str) -> str:
    """`flite rms` of `flite-rms-v093-p110-s095`; espeak-ng's many voices are one source."""
    engine, _, rest = speaker.partition("-")
    if engine in ("espeak", "none"):
        return {"espeak": "espeak-ng", "none": "no speech"}[engine]
    return f"{engine} {rest.rpartition('-v')[0]}"


def main(folder: Path) -> None:
    splits, minutes, sizes = {}, {}, 0
    print("| split | clips | minutes | speakers | human-derived | digit strings | words |")
    print("|---|---|---|---|---|---|---|")
    for split in SPLITS:
        files = sorted([*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")])
        if not files:
            continue
        rows = [
            row for file in files for row in pq.read_table(file).drop_columns("audio").to_pylist()
        ]
        sizes += sum(file.stat().st_size for file in files)
        minutes[split] = Counter()
        for row in rows:
            minutes[split][source(row["speaker"])] += (row["end_time"] - row["begin_time"]) / 60
        spoken = [set(words_of(row["text"])) for row in rows]
        total = minutes[split].total()
        human = sum(m for s, m in minutes[split].items() if not s.startswith(("espeak", "no ")))
        digits = sum(bool(words) and words <= set(DIGITS) for words in spoken)
        people = len({row["speaker"] for row in rows} - {"none"})
        splits[split] = [word for row in rows for word in words_of(row["text"])]
        print(
            f"| {split} | {len(rows):,} | {total:.1f} | {people} | {human / total:.0%} "
            f"| {digits / len(rows):.0%} | {len(set(splits[split]))} |"
        )
    print("\n| minutes of speech | " + " | ".join(minutes) + " |")
    print("|---|" + "---|" * len(minutes))
    for name in sorted(set().union(*minutes.values())):
        print(f"| {name} | " + " | ".join(f"{minutes[s][name]:.1f}" for s in minutes) + " |")
    hours = sum(m.total() for m in minutes.values()) / 60
    print(f"\n{hours:.2f} hours in {sizes / 1e6:.1f} MB, {sizes * 8 / hours / 3.6e6:.1f} kbit/s.")
    rare = Counter(splits["train"] + splits.get("train_words", [])).most_common()[-1]
    print(f"The rarest word of the training speech, {rare[0]}, occurs {rare[1]} times.")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "corpus")
