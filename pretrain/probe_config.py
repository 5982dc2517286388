"""Which labelled images a run's probes use, and how; read by whoever reads a recipe, so without torch."""

from __future__ import annotations

from engine.recipe import Frozen, free


class ProbeConfig(Frozen):
    """Few-shot probes on labelled images; they change no weight."""

    data: str = free("", "labelled shard dataset, folder or address; empty: no probes")
    split: str = free("train", "split of the images learnt from")
    test_split: str = free("val", "split of the images scored")
    sources: tuple[str, ...] = free((), "use these sources only (none given: all); each is a task of its own")
    classes: tuple[str, ...] = free((), "score these classes only (none given: all)")
    shots: int = free(8, "images learnt from, for each source, modality and geometry", ge=2)
    cases: int = free(16, "images scored, for each source, modality and geometry", ge=1)
    window: int = free(1024, "most tokens of an image; larger ones are cut around a structure", ge=8)
    k: int = free(20, "neighbours that vote in the kNN probe", ge=1)
    depth: int = free(0, "blocks passed by the features; 0 for all", ge=0)
    seed: int = free(0, "of the choice of images", ge=0)
