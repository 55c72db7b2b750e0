"""What a run writes into its record, for tests of what reads records."""

import hashlib
import json


def result(
    dataset="pets",
    method="s2a",
    quant="int4",
    seed=0,
    status="ok",
    kind="predicted",
    top1=90.0,
    peak=100.0,
    device="cpu",
    **changes,
):
    """The content of a result.json; `changes` are settings such as optim__batch_size=32."""
    config = {
        "backbone": {"name": "vit_t", "image_size": 112, "checkpoint": None, "kwargs": {}},
        "method": {"name": method, "lr": 1e-3, "blocks": "all"},
        "quant": {"name": quant, "bits": None if quant == "none" else 4, "norm": None, "group": 64},
        "dataset": {"name": dataset, "root": "/photos", "scale": [0.5, 1.0]},
        "optim": {"name": "adamw", "lr": 1e-3, "momentum": 0.9, "batch_size": 64, "micro_batch": None},
        "seed": seed,
        "precision": "fp32",
        "device": "auto",
        "workers": None,
        "tensorboard": False,
        "run_dir": None,
    }
    for key, value in changes.items():
        group, _, name = key.partition("__")
        (config[group] if name else config)[name or group] = value
    ok = status == "ok"
    memory = {"peak_mib": peak, "static_mib": 40.0, "kept_mib": 50.0, "full_finetune_peak_mib": 500.0}
    return {
        "schema": 1,
        "id": hashlib.sha256(json.dumps([config, dataset]).encode()).hexdigest()[:12],
        "status": status,
        "error": None if ok else "it went wrong",
        "config": config,
        "accuracy": {"val_top1": 80.0, "test_top1": top1 if ok else None, "test_top5": None, "best_epoch": 1},
        "parameters": {"total": 5_500_000, "trainable": 51_000, "head": 7_000, "percent": 0.93},
        "memory": {"kind": kind, "full_finetune_kind": "predicted"} | memory if ok else None,
        "throughput": {"train_images_per_second": 33.0 if ok else None},
        "data": {"name": dataset, "revision": "r1", "classes": ["cat", "dog"], "multi_label": False}
        | {"train": 3, "val": 1, "test": 1},
        "weights": "w1",
        "environment": {"torch": "2.6.0", "device": device},
    }
