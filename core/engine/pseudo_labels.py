"""Training without labels: the data sets of a run, and the labels that it makes of what its networks see."""

import hashlib
import os
from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core.data.randomness import derive_seed
from core.engine import distributed, reid
from core.errors import InputError
from core.layers.norm import use_domain
from core.losses import ClusterMemory, HybridMemory
from core.retrieval.agreement import agreement
from core.retrieval.clustering import cluster, cluster_centers, k_means, self_paced_cluster, with_own_labels


class Domain(NamedTuple):
    """A data set of the run.

    data: `ReIDData`; the training pictures of a target have lost their identities, each is one by itself. is_target:
    whether it is to be learned without labels. truth: (N,) what its training pictures do show, for a source to learn
    and for a target to be judged by; None where nobody knows. title: its name, with a number where sets share one.
    """

    data: reid.ReIDData
    is_target: bool
    truth: torch.Tensor | None
    title: str


def load_domains(args, say):
    """[Domain] of `--source` and `--target`; the synthetic baggage set where no target is given.

    Sources come first, and last what can be evaluated: a checkpoint is used with the BatchNorm of the last domain.

    Raises InputError as `load_data`, and for a set that is given twice or too small to cluster.
    """
    domains = []
    specs = [(spec, False) for spec in args.source] + [(spec, True) for spec in args.target or ["synthetic"]]
    names = [spec.partition(":")[0] for spec, _ in specs]
    for number, (spec, is_target) in enumerate(specs, start=1):
        name, _, root = spec.partition(":")
        if "+" in name:
            raise InputError(f"{name}: sets are given one by one here, --target NAME:PATH NAME:PATH")
        if name == "pictures" and not is_target:
            raise InputError(f"--source {spec}: pictures have no labels; give a set with identities, or --target")
        how = {"dataset": name, "data": root or None, "loss": "", "mask_target": ""}
        how |= {"mask_checkpoint": None, "hide_background": 0.0}
        data = reid.load_data(Namespace(**{**vars(args), **how}), say, training=True)
        if os.path.realpath(data.root) in [os.path.realpath(domain.data.root) for domain in domains]:
            raise InputError(f"{data.root} is given twice; source and target are different sets, each given once")
        truth = None if name == "pictures" else torch.tensor([sample.id for sample in data.train])
        if is_target:
            if len(data.train) < 2 * args.min_samples:
                raise InputError(
                    f"{data.root}: {len(data.train)} training pictures are too few to cluster; with --min-samples "
                    f"{args.min_samples} two clusters have {2 * args.min_samples}"
                )
            hidden = [sample._replace(id=number, name="") for number, sample in enumerate(data.train)]
            data = data._replace(train=hidden)
        title = name if names.count(name) == 1 else f"{name}-{number}"
        labels = "without labels" if is_target else f"of {int(truth.max()) + 1} identities"
        say(f"{'target' if is_target else 'source'}: {title} in {data.root}: {len(data.train)} pictures {labels}")
        domains.append(Domain(data, is_target, truth, title))
    return sorted(domains, key=lambda domain: (domain.is_target, bool(domain.data.query)))


class PseudoLabels:
    """What every training picture is taken for, in one numbering of all domains, and what is compared with it.

    Args:
        domains: [Domain]. loaders: for each, of its training pictures (`build_eval_loader`).
        samplers: for each a `LabelSampler`, which follows the labels.
        step: `Step` of all networks; its networks and averages get the classifiers.
        network_options: of the first network, whose number of classes is kept up to date.
        args: `method`, `k1`, `k2`, `eps` (three for spcl, else one), `min_samples`, `clusters` (k-means; 0: DBSCAN),
            `keep_outliers`, `seed`, `amp`.

    Attributes:
        labels: (N,) classes of the sources, then clusters of the targets; -1: left out.
        memory: `HybridMemory` for spcl, `ClusterMemory` for cluster_contrast, else None.
        targets: (N,) what a picture's embedding is compared with: its slot of a hybrid memory, else its label.
    """

    def __init__(self, domains, loaders, samplers, step, network_options, args, device):
        self.domains, self.loaders, self.samplers, self.step = domains, loaders, samplers, step
        self.network_options, self.args, self.device = network_options, args, device
        self.thresholds, self.memory = [None] * len(domains), None
        self.parts = [torch.full((len(d.data.train),), -1) if d.is_target else d.truth for d in domains]

    @property
    def labels(self):
        return _one_after_another(self.parts, [int(part.max()) + 1 for part in self.parts])

    def renew(self, epoch, say):
        """New labels of all targets, and a classifier or a memory that knows them; returns columns of the log.

        Rank 0 clusters, so that all ranks have the same labels. Raises InputError where nothing can be learned.
        """
        features = self._features()
        self.parts, self.thresholds = distributed.on_main(lambda: self._cluster(features, epoch))
        row = {}
        for domain, labels in zip(self.domains, self.parts, strict=True):
            if domain.is_target:
                told, columns = describe_labels(labels, domain, several=self.several_targets)
                say(f"epoch {epoch:>3}  {told}")
                row |= columns
        self._check(epoch)
        self._teach(features)
        self._follow()
        return row

    @property
    def several_targets(self):
        return sum(domain.is_target for domain in self.domains) > 1

    def _features(self):
        """Unit features (N, D) of each domain: what a hybrid memory remembers, else what the networks see now."""
        if isinstance(self.memory, HybridMemory):
            sizes = [len(d.data.train) if d.is_target else int(d.truth.max()) + 1 for d in self.domains]
            return list(self.memory.features.split(sizes))
        features = []
        for number, loader in enumerate(self.loaders):
            seen = []
            for network in self.step.evaluated:
                use_domain(network, number)
                seen.append(F.normalize(reid.extract_features(network, loader, self.device, amp=self.args.amp)))
            features.append(F.normalize(torch.stack(seen).mean(0)))
        return features

    def _cluster(self, features, epoch):
        """([labels (N,)], [threshold]) of each domain."""
        args, parts, thresholds = self.args, list(self.parts), list(self.thresholds)
        how = {"k1": args.k1, "k2": args.k2, "min_samples": args.min_samples}
        for number, domain in enumerate(self.domains):
            if not domain.is_target:
                continue
            if args.clusters:
                seed = derive_seed("k-means", args.seed, epoch)
                labels = k_means(features[number], min(args.clusters, len(features[number])), seed=seed)
            elif args.method == "spcl":
                labels, thresholds[number] = self_paced_cluster(
                    features[number], **how, eps=args.eps, threshold=thresholds[number]
                )
            else:
                labels = cluster(features[number], **how, eps=args.eps[0])
            parts[number] = (with_own_labels(labels) if args.keep_outliers else labels).cpu()
        return parts, thresholds

    def _check(self, epoch):
        for domain, labels in zip(self.domains, self.parts, strict=True):
            if (labels < 0).all():
                raise InputError(
                    f"epoch {epoch}: all {len(labels)} pictures of {domain.data.root} are outliers: give a larger "
                    "--eps, a smaller --min-samples or --k1, --keep-outliers, or --clusters for k-means"
                )
        if self.labels.max() < 1:
            raise InputError(
                f"epoch {epoch}: all pictures fell into one cluster, there is nothing to tell apart: give a smaller "
                "--eps or --k1, or --clusters for k-means"
            )

    def _teach(self, features):
        """Classifiers, or a memory, for the new labels."""
        method, labels = self.args.method, self.labels.to(self.device)
        if method == "spcl":
            if self.memory is None:
                start = [
                    rows if domain.is_target else cluster_centers(rows, domain.truth.to(self.device))
                    for rows, domain in zip(features, self.domains, strict=True)
                ]
                self.memory = HybridMemory(torch.cat(start), self._slot_labels()).to(self.device)
            self.memory.relabel(self._slot_labels())
            return
        centers = F.normalize(cluster_centers(torch.cat(features), labels))  # (C, D)
        if method == "cluster_contrast":
            self.memory = ClusterMemory(centers)
            return
        if method != "uda_tp":
            self.set_classifiers(centers)
        self.step.optimizers[0].state.clear()  # as published

    def set_classifiers(self, weight):
        """Clusters are numbered anew each time, so what a classifier has learned of them is worth nothing."""
        networks = self.step.networks
        for network in (*networks, *(average.module for average in self.step.averages)):
            classifier = nn.Linear(*weight.T.shape, bias=network.classifier.bias is not None, device=self.device)
            with torch.no_grad():
                classifier.weight.copy_(weight)
            network.classifier = classifier
        (group,) = self.step.optimizers[0].param_groups
        group["params"] = [parameter for network in networks for parameter in network.parameters()]
        self.network_options["num_classes"] = len(weight)

    def _slots(self):
        """(N,) of a hybrid memory: one for each class of a source and for each picture of a target."""
        parts = [torch.arange(len(d.data.train)) if d.is_target else d.truth for d in self.domains]
        return _one_after_another(parts, [int(part.max()) + 1 for part in parts])

    def _slot_labels(self):
        labels, slots = self.labels, self._slots()
        return torch.empty(int(slots.max()) + 1, dtype=torch.int64).index_copy_(0, slots, labels).to(self.device)

    def _follow(self):
        """What hangs on the labels: batches, and what a picture is compared with."""
        for sampler, labels in zip(self.samplers, self.parts, strict=True):
            sampler.set_labels(labels)
        self.targets = (self._slots() if self.args.method == "spcl" else self.labels).to(self.device)

    def state_dict(self):
        return {
            "labels": self.parts,
            "pictures": [_digest(domain) for domain in self.domains],
            "thresholds": self.thresholds,
            "memory": self.memory.state_dict() if self.memory is not None else None,
            "peers": [network.state_dict() for network in self.step.networks[1:]],
        }

    def load_state_dict(self, state):
        """Raises ValueError where the state is of other pictures."""
        if state["pictures"] != [_digest(domain) for domain in self.domains]:
            sizes = [len(part) for part in state["labels"]]
            raise ValueError(f"its labels are of other pictures ({sizes}) than those of the sets now")
        self.parts, self.thresholds = state["labels"], state["thresholds"]
        if state["memory"]:
            features = state["memory"]["features"]
            new = ClusterMemory(features) if len(state["memory"]) == 1 else HybridMemory(features, self._slot_labels())
            self.memory = new.to(self.device)
            self.memory.load_state_dict(state["memory"])
        for network, values in zip(self.step.networks[1:], state["peers"], strict=True):
            network.load_state_dict(values)
        self._follow()


def _digest(domain):
    """Of the names of its training pictures, in their order: the set may lie elsewhere when a run goes on."""
    names = "\n".join(os.path.basename(sample.path) for sample in domain.data.train)
    return hashlib.sha256(os.fsencode(names)).hexdigest()


def _one_after_another(parts, sizes):
    """Numbers (N,) of several sets as one numbering: those of a set begin where the set before it ends; -1 stays."""
    first, joint = 0, []
    for part, size in zip(parts, sizes, strict=True):
        joint.append(torch.where(part < 0, part, part + first))
        first += size
    return torch.cat(joint)


def describe_labels(labels, domain, several):
    """A line for people about the labels (N,) of a target, and columns of the log; true labels only judge."""
    sizes = labels[labels >= 0].bincount()
    clusters, clustered = int((sizes > 1).sum()), int(sizes[sizes > 1].sum())
    outliers, size = len(labels) - clustered, clustered / max(clusters, 1)
    line = f"{domain.title}: {clusters} clusters of {size:.1f} pictures, {outliers} outliers"
    row = {"clusters": clusters, "outliers": outliers, "cluster_size": size, "clustered": clustered / len(labels)}
    row |= agreement(with_own_labels(labels), domain.truth) if domain.truth is not None else {}
    return line, {column_of(key, domain, several): value for key, value in row.items()}


def column_of(key, domain, several):
    """A column of the log; with several targets it names the set."""
    return f"{key} {domain.title}" if several else key
