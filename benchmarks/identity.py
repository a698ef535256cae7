"""The identity network on people it has never seen: same person or not, at its own threshold.

    python benchmarks/identity.py --sources FOLDER [--frames 10]

FOLDER holds pictures and clips, each of another person. Of a clip `--frames` frames spread over it are used.
Every two frames of a clip are a pair of the same person; every two frames of different files are a pair of
different people. As frames of one clip are alike, the share of errors is that of each clip, or of each two
files, averaged over these: each person, or pair of people, counts once. Shares over all pairs of frames are
beside it. The last line of the output is one JSON object. Needs the landmark models and the extra `identity`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loki_jax.fitting.clips import default_landmarker
from loki_jax.fitting.tracking import image_landmarks
from loki_jax.metrics.identity import SAME_PERSON_DISTANCE, embedding_distance, load_identity
from loki_jax.video import LazyFrames, read_image

PICTURES, CLIPS = (".jpg", ".png"), (".mp4",)


def pictures_of(path: Path, count: int) -> Iterable[np.ndarray]:
    if path.suffix in PICTURES:
        return [read_image(path)]
    frames = LazyFrames(path)
    return (frames[index] for index in np.linspace(0, len(frames) - 1, count).astype(int))


def figures(pairs: dict[str, np.ndarray], wrong: dict[str, np.ndarray]) -> dict:
    """Counts, share of errors, and distances of groups of pairs."""
    distances = np.concatenate(list(pairs.values()))
    return {
        "groups": len(pairs),
        "pairs": len(distances),
        "error": float(np.mean([errors.mean() for errors in wrong.values()])),
        "error_of_pairs": float(np.concatenate(list(wrong.values())).mean()),
        "distance_mean": float(distances.mean()),
        "distance_range": [float(distances.min()), float(distances.max())],
        "wrong": {name: float(errors.mean()) for name, errors in wrong.items() if errors.any()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=10)
    args = parser.parse_args()
    embed, landmarker = load_identity(), default_landmarker()
    people = {}
    for path in sorted(p for p in args.sources.iterdir() if p.suffix in PICTURES + CLIPS):
        people[path.stem] = np.stack(
            [
                embed(image, image_landmarks(landmarker, image, 0, path.name).points[0])
                for image in pictures_of(path, args.frames)
            ]
        )
        print(f"{path.name}: {len(people[path.stem])} faces", flush=True)
    same = {
        name: np.array([embedding_distance(*pair) for pair in itertools.combinations(faces, 2)])
        for name, faces in people.items()
        if len(faces) > 1
    }
    different = {
        f"{one}, {other}": np.linalg.norm(people[one][:, None] - people[other], axis=-1).ravel()
        for one, other in itertools.combinations(people, 2)
    }
    missed = {name: distance >= SAME_PERSON_DISTANCE for name, distance in same.items()}
    mixed = {name: distance < SAME_PERSON_DISTANCE for name, distance in different.items()}
    error = np.mean([wrong.mean() for wrong in (*missed.values(), *mixed.values())])
    result = {"error": error, "same": figures(same, missed), "different": figures(different, mixed)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
