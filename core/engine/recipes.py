"""What `--recipe` sets in the trainings of ReID with labels, and the losses that go with it."""

RECIPES = {
    # Luo et al. 2019, "Bag of Tricks and A Strong Baseline for Deep Person Re-identification"; add the center loss
    # with --loss "1*cross_entropy+1*triplet+0.0005*center".
    "bot": {
        "height": 256, "width": 128, "ids_per_batch": 16, "images_per_id": 4, "pooling": "avg",
        "optimizer": "adam", "lr": 3.5e-4, "weight_decay": 5e-4, "epochs": 120, "schedule": "multistep",
        "milestones": [40, 70], "gamma": 0.1, "warmup_steps": 10, "warmup_factor": 0.01,
        "label_smoothing": 0.1, "margin": 0.3, "flip": 0.5, "pad": 10, "erasing": 0.5, "mask_target": "gaussian",
    },
    # The suitcase fork of OpenUnReID on MVB.
    "suitcase": {
        "height": 256, "width": 256, "ids_per_batch": 8, "images_per_id": 4, "pooling": "gem", "dropout": 0.3,
        "optimizer": "adam", "lr": 5e-4, "weight_decay": 5e-4, "epochs": 100, "iterations_per_epoch": 200,
        "schedule": "cosine", "min_lr": 5e-5, "label_smoothing": 0.1,
        "flip": 0.5, "pad": 10, "autoaugment": True, "blur": 0.3, "erasing": 0.7,
        "mask_target": "gaussian", "sigma_ratio": 0.1, "mask_threshold": 0.1,
    },
    # Herzog et al. 2021, "Lightweight Multi-Branch Network for Person Re-Identification"; settings of its code, which
    # crops out of 1.05 times the size where we pad.
    "lightmbn": {
        "model": "lmbn_n", "height": 384, "width": 128, "ids_per_batch": 6, "images_per_id": 8, "embedding_dim": 512,
        "optimizer": "adam", "lr": 6e-4, "weight_decay": 5e-4, "epochs": 130, "schedule": "cosine_to_min",
        "min_lr": 6e-7, "warmup": "count", "warmup_steps": 10, "label_smoothing": 0.1, "margin": 0.7,
        "flip": 0.5, "pad": 10, "erasing": 0.5,
    },
    # Sun et al. 2018, "Beyond Part Models"; settings of its code.
    "pcb": {
        "model": "pcb", "neck": "none", "height": 384, "width": 128, "ids_per_batch": 64,
        "images_per_id": 1, "embedding_dim": 256, "dropout": 0.5, "optimizer": "sgd", "nesterov": True,
        "momentum": 0.9, "lr": 0.01, "head_lr": 0.1, "weight_decay": 5e-4, "epochs": 60, "schedule": "step",
        "step_size": 40, "gamma": 0.1, "label_smoothing": 0.0, "flip": 0.5, "pad": 0, "erasing": 0.0,
    },
    # Wang et al. 2018, "Learning Discriminative Features with Multiple Granularities".
    "mgn": {
        "model": "mgn", "height": 384, "width": 128, "ids_per_batch": 16, "images_per_id": 4, "embedding_dim": 256,
        "optimizer": "sgd", "momentum": 0.9, "lr": 0.01, "weight_decay": 5e-4, "epochs": 80, "schedule": "multistep",
        "milestones": [40, 60], "gamma": 0.1, "label_smoothing": 0.0, "margin": 1.2,
        "flip": 0.5, "pad": 0, "erasing": 0.0,
    },
    # Zhou et al. 2019, "Omni-Scale Feature Learning"; settings of torchreid.
    "osnet": {
        "backbone": "osnet_x1_0", "neck": "none", "height": 256, "width": 128, "ids_per_batch": 64,
        "images_per_id": 1, "optimizer": "amsgrad", "lr": 1.5e-3, "weight_decay": 5e-4, "epochs": 150,
        "freeze_epochs": 10, "schedule": "step", "step_size": 60, "gamma": 0.1, "label_smoothing": 0.1,
        "flip": 0.5, "pad": 0, "erasing": 0.0, "distance": "euclidean",
    },
    # Small pictures and few epochs: the whole run in minutes on two CPU cores.
    "quick": {
        "height": 64, "width": 64, "ids_per_batch": 8, "images_per_id": 4, "pooling": "avg",
        "optimizer": "adam", "lr": 1e-3, "weight_decay": 5e-4, "epochs": 8, "iterations_per_epoch": 20,
        "schedule": "cosine", "min_lr": 1e-5,
        "warmup_steps": 1, "warmup_factor": 0.1, "label_smoothing": 0.1, "margin": 0.3,
        "flip": 0.5, "pad": 4, "erasing": 0.3,
    },
}  # fmt: skip

# What --loss is where none is given; the second part is added for a backbone with a mask decoder.
LOSSES = {
    "bot": ("1*cross_entropy+1*triplet", "0.05*gaussian_mask"),
    "suitcase": ("1*cross_entropy+1*softmax_triplet", "0.05*gaussian_mask"),
    "lightmbn": ("0.5*cross_entropy+0.5*multi_similarity",),
    "pcb": ("1*cross_entropy",),
    "mgn": ("0.125*cross_entropy+0.333*triplet",),  # the means over its 8 and 3 branches, as sums
    "osnet": ("1*cross_entropy",),
    "quick": ("1*cross_entropy+1*triplet", "1*combined_mask"),
}

# What the help says of a recipe: its published mAP / Rank-1, and where other data want other settings.
PUBLISHED = {
    "bot": "published: Market-1501 85.7 / 94.1, DukeMTMC 75.9 / 86.2, with the center loss 85.9 / 94.5, 76.4 / 86.4",
    "lightmbn": "published: Market-1501 91.5 / 96.3 (re-ranked 95.3 / 96.8), DukeMTMC 83.7 / 92.1, CUHK03 labeled 85.1 "
    "/ 87.2; with --model lmbn_r Market-1501 90.5 / 96.1. CUHK03 wants --ids-per-batch 8 --epochs 180 --lr 3.5e-4, "
    "or ends ten points lower",
    "pcb": "published: Market-1501 77.4 / 92.3",
    "mgn": "published: Market-1501 86.9 / 95.7, DukeMTMC 78.4 / 88.7",
    "osnet": "published: Market-1501 82.6 / 94.2; with --backbone osnet_x0_25 --lr 0.003 --epochs 180 --step-size 80 "
    "--ids-per-batch 128 Market-1501 75.0 / 91.2",
}


def default_recipe(args):
    return "quick" if args.data is None and args.dataset in (None, "synthetic", "synthetic_hard") else "bot"
