"""The configs of a job's bundle, as MONAI's ConfigParser reads them: inference, training, evaluation, several GPUs.

Keys are those of MONAI's model zoo, where its commands and MONAI Label look for them. Values that begin with $ are
expressions, those with @ refer to another key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoseg.data.preprocess import ChannelNorm
from autoseg.networks import divisor
from autoseg.plan import Plan

Config = dict[str, Any]

FINE_TUNING_RATE = 2e-4
"""Highest learning rate when a bundle goes on training. Source: Auto3DSeg's rate for AdamW; the plan's own, for a
network that knows nothing yet, would undo what was learnt. A choice."""
FINE_TUNING_EPOCHS = 50
"""Source: MONAI Label's default."""
OPTIMIZERS = {"adam": "torch.optim.Adam", "novograd": "Novograd"}
"""Optimizer of a plan -> MONAI's or PyTorch's; AdamW for all others."""
DEVICE = "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')"
CLEANING = ("largest", "min_mm3", "slice_run", "min_voxels", "fill_holes")
"""What a rule of the postprocessing may do, in this order."""
LOSS = {"dice_ce": "DiceCELoss", "dice_focal": "DiceFocalLoss"}
AMP = "$@use_amp and torch.device(@device).type == 'cuda'"
AMP_TYPE = {
    "dtype": "$torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float16"
}


def normalization(norms: Sequence[ChannelNorm]) -> list[Config]:
    """MONAI's transforms that normalise each channel of `image` in its own way."""
    if all(norm == norms[0] for norm in norms):
        return _normalize("image", norms[0])
    keys = [f"image_{place}" for place in range(len(norms))]
    return [
        {"_target_": "SplitDimd", "keys": "image", "output_postfixes": [str(p) for p in range(len(norms))]},
        *(transform for key, norm in zip(keys, norms, strict=True) for transform in _normalize(key, norm)),
        {"_target_": "ConcatItemsd", "keys": keys, "name": "image"},
        {"_target_": "DeleteItemsd", "keys": keys},
    ]


def _normalize(key: str, norm: ChannelNorm) -> list[Config]:
    if norm.mode == "none":
        return []
    if norm.bounds is not None and norm.mode in ("ct", "range"):
        low, high = norm.bounds
        scaled = (0.0, 1.0) if norm.mode == "range" else ((low - norm.mean) / norm.std, (high - norm.mean) / norm.std)
        bounds = {"a_min": low, "a_max": high, "b_min": scaled[0], "b_max": scaled[1], "clip": True}
        return [{"_target_": "ScaleIntensityRanged", "keys": key, **bounds}]
    steps = [{"_target_": "NormalizeIntensityd", "keys": key, "nonzero": norm.nonzero, "channel_wise": True}]
    if norm.mode == "meanstdtanh":
        steps.append({"_target_": "Lambdad", "keys": key, "func": "$lambda x: 3 * torch.tanh(x / 3)"})
    return steps


def preprocessing(plan: Plan, *, label: str = "") -> list[Config]:
    """From files to what the network sees.

    Args:
        label: key of a label that goes with the image onto its grid, as a target.
    """
    keys = ["image", label] if label else ["image"]
    steps: list[Config] = [{**step, "keys": keys} for step in LOADING]
    if plan.frame is not None:
        steps.append(
            {"_target_": "scripts.transforms.TurnToFramed", "keys": keys, **plan.frame.model_dump(mode="json")}
        )
    if label:
        steps.append(_encode(plan, label))
    if plan.crop_foreground:
        crop = {"source_key": "image", "select_fn": "$lambda x: x != 0", "allow_smaller": True}
        steps.append({"_target_": "CropForegroundd", "keys": keys, **crop})
    steps += normalization(plan.preprocessing.norms)
    modes = ["trilinear", "nearest-exact"][: len(keys)]
    steps.append(
        {"_target_": "scripts.transforms.ResampleFieldOfViewd", "keys": keys, "pixdim": "@pixdim", "mode": modes}
    )
    return [*steps, {"_target_": "EnsureTyped", "keys": keys}]


def _encode(plan: Plan, key: str) -> Config:
    values = [list(c.values) for c in plan.classes]
    return {"_target_": "scripts.transforms.EncodeLabeld", "keys": key, "values": values, "regions": plan.sigmoid}


def to_labels(plan: Plan, *, finishing: Sequence[Config] = ()) -> list[Config]:
    """From probabilities `pred` on the image's own grid to label values in a file.

    Args:
        finishing: what is done to the label values before they are written.
    """
    label_map = plan.label_map
    steps: list[Config]
    if plan.sigmoid:
        steps = [{"_target_": "AsDiscreted", "keys": "pred", "threshold": "$0.5 + 1e-7"}, _paint(plan)]
    else:
        indices = list(range(1, len(plan.classes) + 1))
        steps = [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}]
        if indices != list(label_map.painted_values):
            steps.append(
                {
                    "_target_": "MapLabelValued",
                    "keys": "pred",
                    "orig_labels": indices,
                    "target_labels": list(label_map.painted_values),
                }
            )
    if len(plan.channels) > 1:
        steps.append({"_target_": "scripts.transforms.ForgetChannelDimd", "keys": "pred"})
    return [*steps, *finishing]


def cleaning(plan: Plan, rules: Sequence[Mapping[str, Any]]) -> list[Config]:
    """Transforms that clean label values; for regions, each by itself.

    Args:
        rules: of the postprocessing, as plain data: `name` of a class, and what is done to it.
    """
    places, painted = {c.name: place for place, c in enumerate(plan.classes)}, plan.label_map.painted_values
    kept = []
    for rule in rules:
        place = places[rule["name"]]
        where = {"channel": place, "value": 1} if plan.sigmoid else {"channel": 0, "value": painted[place]}
        kept.append({**where, **{key: rule[key] for key in CLEANING if rule.get(key)}})
    if not kept:
        return []
    clean: Config = {"_target_": "scripts.finishing.CleanLabelsd", "keys": "pred", "rules": kept}
    return [_encode(plan, "pred"), clean, _paint(plan)] if plan.sigmoid else [clean]


def _paint(plan: Plan) -> Config:
    label_map = plan.label_map
    overlaps = [[sorted(inside), value] for inside, value in label_map.overlap_values.items()]
    painted = {"values": list(label_map.painted_values), "order": list(label_map.paint_order), "overlaps": overlaps}
    return {"_target_": "scripts.transforms.PaintRegionsd", "keys": "pred", **painted}


def _save(plan: Plan) -> Config:
    dtype = "$np.uint8" if max(plan.label_map.known_values) < 256 else "$np.uint16"
    where = {"output_dir": "@output_dir", "output_postfix": "", "separate_folder": False, "resample": False}
    return {"_target_": "SaveImaged", "keys": "pred", "output_dtype": dtype, **where}


def activation(plan: Plan) -> Config:
    """Logits to probabilities."""
    return {"_target_": "Activationsd", "keys": "pred", "sigmoid" if plan.sigmoid else "softmax": True}


def _invert(transform: str) -> Config:
    back = {"transform": transform, "orig_keys": "image", "nearest_interp": False, "to_tensor": True}
    return {"_target_": "Invertd", "keys": "pred", **back}


def inferer(plan: Plan) -> Config:
    """Windows as autoseg places them."""
    shift = 0 if plan.sigmoid else 1
    mirrored = plan.tta and plan.mirror_axes
    return {
        "_target_": "scripts.inferer.WindowInferer",
        "roi_size": list(plan.roi_size),
        "overlap": "@overlap",
        "divisor": list(divisor(plan)),
        "mirror_axes": "@mirror_axes",
        "mirrored_pairs": [[a + shift, b + shift] for a, b in plan.mirrored_classes] if mirrored else [],
        "sw_batch_size": 1,
    }


def common(plan: Plan, network_def: Config, *, lowres: Plan | None = None) -> Config:
    """What all of a bundle's configs begin with.

    Args:
        lowres: plan of a second model, of the same network at larger voxels, that `highres: false` chooses.
    """
    pixdim: Any = list(plan.resample_resolution)
    if lowres is not None:
        pixdim = f"${list(plan.resample_resolution)} if @highres else {list(lowres.resample_resolution)}"
    return {
        "imports": ["$import os", "$import numpy as np", "$import torch"],
        "bundle_root": ".",
        "ckpt_dir": "$@bundle_root + '/models'",
        "output_dir": "$@bundle_root + '/eval'",
        "dataset_dir": "./data",
        "datalist": None,
        "image_keys": ["image"],
        "device": DEVICE,
        "displayable_configs": {"highres": True},
        "highres": "@displayable_configs#highres",
        "modelname": "$'model.pt' if @highres else 'model_lowres.pt'",
        "pixdim": pixdim,
        "overlap": plan.overlap,
        "mirror_axes": list(plan.mirror_axes) if plan.tta else [],
        "use_amp": plan.precision != "fp32",
        "network_def": network_def,
        "network": "$@network_def.to(@device)",
    }


def _loader() -> Config:
    return {
        "_target_": "CheckpointLoader",
        "load_path": "$@ckpt_dir + '/' + @modelname",
        "load_dict": {"model": "@network"},
        "map_location": "@device",
    }


def inference(
    plan: Plan, network_def: Config, *, lowres: Plan | None = None, finishing: Sequence[Config] = ()
) -> Config:
    """`configs/inference.json`: from image files to label files."""
    cases = {"dataset_dir": "@dataset_dir", "datalist": "@datalist", "image_keys": "@image_keys"}
    steps = [activation(plan), _invert("@preprocessing"), *to_labels(plan, finishing=finishing), _save(plan)]
    return {
        **common(plan, network_def, lowres=lowres),
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing(plan)},
        "dataset": {
            "_target_": "Dataset",
            "data": {"_target_": "scripts.cases.inference_cases", **cases},
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": inferer(plan),
        "postprocessing": {"_target_": "Compose", "transforms": steps},
        "handlers": [_loader(), {"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": _evaluator("dataloader", "inferer", "postprocessing", "handlers"),
        "run": ["$@evaluator.run()"],
        "evaluating": ["$@evaluator.run()"],
    }


LOADING: list[Config] = [
    {"_target_": "LoadImaged", "keys": "image"},
    {"_target_": "EnsureChannelFirstd", "keys": "image"},
    {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
]


def member(plan: Plan, network_defs: Sequence[Config]) -> Config:
    """Networks of one preprocessing as a part of an ensemble.

    Args:
        plan: of any of them.
    """
    own = {"pixdim": list(plan.resample_resolution), "overlap": plan.overlap}
    own["mirror_axes"] = list(plan.mirror_axes) if plan.tta else []
    steps = preprocessing(plan)[len(LOADING) :]
    return {
        "_target_": "scripts.ensemble.Member",
        "networks": list(network_defs),
        "transforms": [_filled(step, own) for step in steps],
        "inferer": _filled(inferer(plan), own),
        "regions": plan.sigmoid,
    }


def _filled(component: Config, values: Config) -> Config:
    """A component with values in the place of references to them."""
    references = {f"@{key}": value for key, value in values.items()}
    return {k: references.get(v, v) if isinstance(v, str) else v for k, v in component.items()}


def ensemble_inference(
    plan: Plan, members: Sequence[Config], weights: Sequence[float], *, vote: bool, finishing: Sequence[Config]
) -> Config:
    """`configs/inference.json` of several networks: each prepares the image by itself, on the image's own grid.

    Args:
        plan: of one of them, for classes and channels.
        weights: of the members.
    """
    network: Config = {
        "_target_": "scripts.ensemble.Ensemble",
        "members": list(members),
        "weights": list(weights),
        "vote": vote,
    }
    config = inference(plan, network, finishing=finishing)
    for key in ("pixdim", "overlap", "mirror_axes"):
        del config[key]
    steps = [*LOADING, {"_target_": "EnsureTyped", "keys": "image"}]
    config["preprocessing"] = {"_target_": "Compose", "transforms": steps}
    config["inferer"] = {"_target_": "SimpleInferer"}
    config["postprocessing"]["transforms"].pop(0)  # its outputs are probabilities
    return config


def _evaluator(loader: str, inferer_id: str, post: str, handlers: str) -> Config:
    return {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": f"@{loader}",
        "network": "@network",
        "inferer": f"@{inferer_id}",
        "postprocessing": f"@{post}",
        "val_handlers": f"@{handlers}",
        "amp": AMP,
        "amp_kwargs": AMP_TYPE,
    }


def train(plan: Plan, network_def: Config, *, lowres: Plan | None = None) -> Config:
    """`configs/train.json`: goes on from models/model.pt, and writes the best weights there."""
    cases = {"dataset_dir": "@dataset_dir", "datalist": "@datalist", "fold": "@fold", "image_keys": "@image_keys"}
    loss = {"_target_": LOSS[plan.loss], "to_onehot_y": not plan.sigmoid, "batch": True}
    optimizer = OPTIMIZERS.get(plan.optimizer, "torch.optim.AdamW")
    start = ["$monai.utils.set_determinism(seed=@seed)"]
    return {
        **common(plan, network_def, lowres=lowres),
        "fold": plan.fold,
        "seed": plan.seed,
        "num_epochs": FINE_TUNING_EPOCHS,
        "val_interval": 1,
        "learning_rate": min(plan.learning_rate, FINE_TUNING_RATE),
        "cache_rate": 1.0,
        "num_workers": 0,
        "cases": {"_target_": "scripts.cases.training_cases", **cases},
        "loss": {
            "_target_": "DeepSupervisionLoss",
            "loss": {**loss, "sigmoid" if plan.sigmoid else "softmax": True},
        },
        "optimizer": {
            "_target_": optimizer,
            "params": "$@network.parameters()",
            "lr": "@learning_rate",
            "weight_decay": plan.weight_decay,
        },
        "lr_scheduler": {
            "_target_": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "optimizer": "@optimizer",
            "T_max": "@num_epochs",
        },
        "train": _train(plan),
        "validate": _validate(plan),
        "initialize": start,
        "run": ["$@train#trainer.run()"],
        "training": [*start, "$@train#trainer.run()"],
    }


def _random(plan: Plan) -> list[Config]:
    """Patches, and how they are changed at random. Sizes of the changes: a choice, milder than autoseg's own."""
    roi, both = list(plan.roi_size), ["image", "label"]
    share = plan.foreground_fraction
    steps: list[Config] = [
        {"_target_": "SpatialPadd", "keys": both, "spatial_size": roi},
        {
            "_target_": "RandCropByPosNegLabeld",
            "keys": both,
            "label_key": "label",
            "spatial_size": roi,
            "pos": share,
            "neg": 1 - share,
            "num_samples": 1,
        },
    ]
    if plan.augment != "none":
        axes = [axis for axis in plan.mirror_axes if axis != 0 or not plan.mirrored_classes]
        steps += [{"_target_": "RandFlipd", "keys": both, "spatial_axis": axis, "prob": 0.5} for axis in axes]
        steps += [
            {"_target_": "RandScaleIntensityd", "keys": "image", "factors": 0.1, "prob": 0.5},
            {"_target_": "RandShiftIntensityd", "keys": "image", "offsets": 0.1, "prob": 0.5},
        ]
    return steps


def _train(plan: Plan) -> Config:
    trainer = {
        "_target_": "SupervisedTrainer",
        "max_epochs": "@num_epochs",
        "device": "@device",
        "train_data_loader": "@train#dataloader",
        "network": "@network",
        "loss_function": "@loss",
        "optimizer": "@optimizer",
        "inferer": "@train#inferer",
        "train_handlers": "@train#handlers",
        "amp": AMP,
        "amp_kwargs": AMP_TYPE,
    }
    return {
        "deterministic_transforms": preprocessing(plan, label="label"),
        "random_transforms": _random(plan),
        "preprocessing": {
            "_target_": "Compose",
            "transforms": "$@train#deterministic_transforms + @train#random_transforms",
        },
        "dataset": {
            "_target_": "CacheDataset",
            "data": "$@cases['training']",
            "transform": "@train#preprocessing",
            "cache_rate": "@cache_rate",
            "progress": False,
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@train#dataset",
            "batch_size": plan.batch_size,
            "shuffle": True,
            "num_workers": "@num_workers",
        },
        "inferer": {"_target_": "SimpleInferer"},
        "handlers": [
            {**_loader(), "_disabled_": "$not os.path.exists(@ckpt_dir + '/' + @modelname)"},
            {"_target_": "LrScheduleHandler", "lr_scheduler": "@lr_scheduler", "print_lr": False},
            {
                "_target_": "ValidationHandler",
                "validator": "@validate#evaluator",
                "epoch_level": True,
                "interval": "@val_interval",
            },
            {
                "_target_": "StatsHandler",
                "tag_name": "train_loss",
                "output_transform": "$monai.handlers.from_engine(['loss'], first=True)",
            },
        ],
        "trainer": trainer,
    }


def _validate(plan: Plan) -> Config:
    """Scored on the labels' own grid, as autoseg does."""
    image = preprocessing(plan)
    load_label = [
        {"_target_": "LoadImaged", "keys": "label"},
        {"_target_": "EnsureChannelFirstd", "keys": "label"},
        _encode(plan, "label"),
    ]
    if plan.sigmoid:
        discrete: Config = {"_target_": "AsDiscreted", "keys": "pred", "threshold": "$0.5 + 1e-7"}
    else:
        both = {"keys": ["pred", "label"], "argmax": [True, False], "to_onehot": plan.num_outputs}
        discrete = {"_target_": "AsDiscreted", **both}
    pair = "$monai.handlers.from_engine(['pred', 'label'])"
    return {
        "image_transforms": image,
        "label_transforms": load_label,
        "preprocessing": {
            "_target_": "Compose",
            "transforms": "$@validate#label_transforms + @validate#image_transforms",
        },
        "dataset": {"_target_": "Dataset", "data": "$@cases['validation']", "transform": "@validate#preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@validate#dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": "@num_workers",
        },
        "inferer": inferer(plan),
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [activation(plan), _invert("@validate#preprocessing"), discrete],
        },
        "handlers": [
            {"_target_": "StatsHandler", "iteration_log": False},
            {
                "_target_": "CheckpointSaver",
                "save_dir": "@ckpt_dir",
                "save_dict": {"model": "@network"},
                "save_key_metric": True,
                "key_metric_filename": "$@modelname",
            },
        ],
        "key_metric": {
            "val_mean_dice": {"_target_": "MeanDice", "include_background": plan.sigmoid, "output_transform": pair}
        },
        "evaluator": {
            **_evaluator("validate#dataloader", "validate#inferer", "validate#postprocessing", "validate#handlers"),
            "key_val_metric": "@validate#key_metric",
        },
    }


def evaluate() -> Config:
    """`configs/evaluate.json`, laid over train.json: the metric of the held-out cases, in files under `output_dir`."""
    return {
        "validate#handlers": [
            _loader(),
            {
                "_target_": "MetricsSaver",
                "save_dir": "@output_dir",
                "metrics": ["val_mean_dice"],
                "metric_details": ["val_mean_dice"],
                "batch_transform": "$lambda batch: [item['image'].meta for item in batch]",
                "summary_ops": "*",
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "initialize": [],
        "run": ["$@validate#evaluator.run()"],
        "evaluating": ["$@validate#evaluator.run()"],
    }


DISTRIBUTED: Config = {
    "device": "$torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else "
    "torch.device('cpu')",
    "validate#sampler": {
        "_target_": "DistributedSampler",
        "dataset": "@validate#dataset",
        "even_divisible": False,
        "shuffle": False,
    },
    "validate#dataloader#sampler": "@validate#sampler",
    "initialize": [
        "$import torch.distributed as dist",
        "$import torch.distributed.nn",  # holds on to the group that is there when it is imported, as it soon would be
        "$dist.is_initialized() or dist.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')",
        "$torch.cuda.is_available() and torch.cuda.set_device(@device)",
        "$monai.utils.set_determinism(seed=@seed)",
    ],
    "finalize": ["$dist.is_initialized() and dist.destroy_process_group()"],
}
"""What several processes need, one a GPU; on a CPU they talk by gloo.

Nothing may hold the group by which metrics are gathered once it is destroyed: its threads would outlive Python, and one
that frees a tensor then aborts the process (PyTorch 2.13 with gloo)."""


def multi_gpu_train() -> Config:
    """`configs/multi_gpu_train.json`, laid over train.json."""
    return {
        **DISTRIBUTED,
        "network": {
            "_target_": "torch.nn.parallel.DistributedDataParallel",
            "module": "$@network_def.to(@device)",
            "device_ids": "$[@device] if torch.cuda.is_available() else None",
            # Its own, since the network is held until Python ends, and with it the threads of its group.
            "process_group": "$dist.new_group()",
            "find_unused_parameters": True,
        },
        "train#sampler": {
            "_target_": "DistributedSampler",
            "dataset": "@train#dataset",
            "even_divisible": True,
            "shuffle": True,
        },
        "train#dataloader#sampler": "@train#sampler",
        "train#dataloader#shuffle": False,
        "train#trainer#train_handlers": "$@train#handlers[: -1 if dist.get_rank() > 0 else None]",
        "validate#evaluator#val_handlers": "$None if dist.get_rank() > 0 else @validate#handlers",
        "run": ["$@train#trainer.run()"],
        "training": ["$@train#trainer.run()"],
    }


def multi_gpu_evaluate() -> Config:
    """`configs/multi_gpu_evaluate.json`, laid over train.json and evaluate.json."""
    return {
        **DISTRIBUTED,
        "validate#evaluator#val_handlers": "$@validate#handlers[: -1 if dist.get_rank() > 0 else None]",
        "run": ["$@validate#evaluator.run()"],
        "evaluating": ["$@validate#evaluator.run()"],
    }


def inference_trt() -> Config:
    """`configs/inference_trt.json`, laid over inference.json: the network through ONNX by TensorRT."""
    return {
        "imports": ["$import os", "$import numpy as np", "$import torch", "$from monai.networks import trt_compile"],
        "trt_precision": "fp16",
        "network": "$trt_compile(@network_def.to(@device), @ckpt_dir + '/' + @modelname, "
        "args={'precision': @trt_precision})",
        "initialize": [{"_target_": "scripts.check.require_tensorrt"}],
    }
