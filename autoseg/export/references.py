"""Where the methods that autoseg uses were published, for texts that cite them."""

from __future__ import annotations

from autoseg.config.networks import NETWORKS, AlgoName

OPTIMIZERS = {
    "muon": "Muon [@muon]",
    "adamw": "AdamW [@adamw]",
    "adam": "Adam",
    "novograd": "NovoGrad",
    "sgd": "stochastic gradient descent with Nesterov momentum",
}
"""Setting -> the name in a sentence."""

REFERENCES = {
    "monai": "Cardoso MJ et al. MONAI: an open-source framework for deep learning in healthcare. arXiv "
    "2211.02701, 2022.",
    "pytorch": "Paszke A et al. PyTorch: an imperative style, high-performance deep learning library. NeurIPS 2019.",
    **{name: row.reference for name, row in NETWORKS.items() if row.reference},
    "nnunet": "Isensee F et al. nnU-Net: a self-configuring method for deep learning-based biomedical image "
    "segmentation. "
    "Nature Methods 18, 2021.",
    "dice_loss": "Milletari F et al. V-Net: fully convolutional neural networks for volumetric medical image "
    "segmentation. 3DV 2016.",
    "muon": "Jordan K et al. Muon: an optimizer for hidden layers in neural networks. 2024.",
    "adamw": "Loshchilov I, Hutter F. Decoupled weight decay regularization. ICLR 2019.",
    "mae": "He K et al. Masked autoencoders are scalable vision learners. CVPR 2022.",
    "contrastive": "Chen T et al. A simple framework for contrastive learning of visual representations. ICML 2020.",
    "metrics": "Maier-Hein L et al. Metrics reloaded: recommendations for image analysis validation. Nature "
    "Methods 21, "
    "2024.",
    "nsd": "Nikolov S et al. Clinically applicable segmentation of head and neck anatomy for radiotherapy. J "
    "Med Internet "
    "Res 23, 2021.",
    "hall": "Hall P. On the removal of skewness by transformation. J R Stat Soc B 54, 1992.",
    "holm": "Holm S. A simple sequentially rejective multiple test procedure. Scand J Stat 6, 1979.",
    "calibration": "Guo C et al. On calibration of modern neural networks. ICML 2017.",
    "claim": "Tejani AS et al. Checklist for artificial intelligence in medical imaging (CLAIM): 2024 "
    "update. Radiology: "
    "Artificial Intelligence 6, 2024.",
    "tripod": "Collins GS et al. TRIPOD+AI statement: updated guidance for reporting clinical prediction "
    "models that use "
    "regression or machine learning methods. BMJ 385, 2024.",
}
"""Key -> the publication."""


def network_name(algo: AlgoName) -> str:
    """A network's name in sentences."""
    row = NETWORKS[algo]
    return row.title or row.own.__name__


def network_cited(algo: AlgoName) -> str:
    """A network's name, with its publication where it has one."""
    return f"{network_name(algo)} {cited(algo)}" if algo in REFERENCES else network_name(algo)


def cited(key: str) -> str:
    """A citation in a text, as pandoc and most Markdown editors with references write it."""
    assert key in REFERENCES, key
    return f"[@{key}]"


def used_in(text: str) -> list[str]:
    """References that a text cites, as lines, in the order of the table."""
    return [f"- [@{key}]: {words}" for key, words in REFERENCES.items() if f"[@{key}]" in text]
