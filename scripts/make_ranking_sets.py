"""Two small sets for ranking, made of real text, in the columns that mteb reads; its own are not to be had offline.

python scripts/make_ranking_sets.py ../shared/data OUT
usmoe eval --data OUT --tasks NewsgroupsSubjects,BankingIntents

NewsgroupsSubjects, Retrieval: subject lines of 20 Newsgroups, 300 at most, as queries over the first 400 characters of
1,000 posts; the relevant one is the post that bore the subject. Subjects that several posts share (a thread) and those
of fewer than three words are left out as queries: 275 are left of seed 0's posts. Replies and quotes stay in the posts.
BankingIntents, Reranking: 300 questions of BANKING77's test split, each with 4 questions of its intent and 16 of
others, from the train split, in random order.

The same arguments give the same files. 20 Newsgroups states no licence (Usenet posts, free for research); BANKING77 is
CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from usmoe.data.local import find
from usmoe.data.rows import read

QUERIES, DOCUMENTS, CHARACTERS = 300, 1000, 400
POSITIVES, NEGATIVES = 4, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with SetFit/20_newsgroups and mteb/banking77")
    parser.add_argument("out", type=Path, help="where the two folders are made")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, make in {"NewsgroupsSubjects": newsgroups_subjects, "BankingIntents": banking_intents}.items():
        kind, source, parts = make(args.data, np.random.default_rng(args.seed))
        folder = args.out / name
        if folder.exists():
            parser.error(f"{folder} is already there. Give another folder.")
        folder.mkdir(parents=True)
        for part, columns in parts.items():
            pq.write_table(pa.table(columns), folder / f"{part}.parquet")
        said = {"mteb": {"name": name, "type": kind}, "made of": source, "seed": args.seed}
        (folder / "manifest.json").write_text(json.dumps(said, indent=1) + "\n")
        print(folder, *(f"{part}: {len(next(iter(columns.values())))}" for part, columns in parts.items()))


def newsgroups_subjects(data: Path, rng: np.random.Generator) -> tuple[str, str, dict[str, Any]]:
    """Subject lines to find posts by."""
    posts = read(find(data, "SetFit/20_newsgroups").file("test")).to_dict()
    bare = [re.sub(r"^(re|fwd?):\s*", "", subject.strip(), flags=re.IGNORECASE) for subject in posts["subject"]]
    threads = dict(zip(*np.unique([subject.casefold() for subject in bare], return_counts=True), strict=True))
    long = np.array([n for n, text in enumerate(posts["text"]) if len(text.split()) >= 20])
    chosen = rng.permutation(long)[:DOCUMENTS].tolist()
    asked = [n for n in chosen if len(bare[n].split()) >= 3 and threads[bare[n].casefold()] == 1][:QUERIES]
    parts = {
        "corpus": {"_id": [f"d{n}" for n in chosen], "text": [posts["text"][n].strip()[:CHARACTERS] for n in chosen]},
        "queries": {"_id": [f"q{n}" for n in asked], "text": [bare[n] for n in asked]},
        "qrels": {
            "query-id": [f"q{n}" for n in asked],
            "corpus-id": [f"d{n}" for n in asked],
            "score": [1] * len(asked),
        },
    }
    return "Retrieval", "SetFit/20_newsgroups, test", parts


def banking_intents(data: Path, rng: np.random.Generator) -> tuple[str, str, dict[str, Any]]:
    """Questions to put before those of other intents."""
    local = find(data, "mteb/banking77")
    questions, pool = (read(local.file(split)).to_dict() for split in ("test", "train"))
    intents = np.array(pool["label"])
    asked = rng.permutation(len(questions["text"]))[:QUERIES].tolist()
    ranked: list[list[int]] = []
    for n in asked:
        same = intents == questions["label"][n]
        both = (
            rng.choice(np.flatnonzero(same), POSITIVES, replace=False),
            rng.choice(np.flatnonzero(~same), NEGATIVES, replace=False),
        )
        ranked.append(rng.permutation(np.concatenate(both)).tolist())
    used = sorted({one for candidates in ranked for one in candidates})
    judged = [
        (f"q{n}", f"d{one}", int(intents[one] == questions["label"][n]))
        for n, candidates in zip(asked, ranked, strict=True)
        for one in candidates
    ]
    parts = {
        "corpus": {"_id": [f"d{n}" for n in used], "text": [pool["text"][n] for n in used]},
        "queries": {"_id": [f"q{n}" for n in asked], "text": [questions["text"][n] for n in asked]},
        "qrels": dict(zip(("query-id", "corpus-id", "score"), map(list, zip(*judged, strict=True)), strict=True)),
        "top_ranked": {
            "query-id": [f"q{n}" for n in asked],
            "corpus-ids": [[f"d{one}" for one in candidates] for candidates in ranked],
        },
    }
    return "Reranking", "mteb/banking77, test and train", parts


if __name__ == "__main__":
    main()
