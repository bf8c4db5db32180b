"""The picture sheets of a ReID run: what the network is shown, whom it finds, and where it sees the object."""

import torch
import torch.nn.functional as F

from core.data.transforms import denormalise
from core.engine.reid import labels_of
from core.retrieval.distance import nearest
from core.retrieval.projection import principal_components
from core.retrieval.ranking import junk_mask
from core.visualize.embedding import embedding_plot
from core.visualize.retrieval import RankRow, augmentation_sheet, cluster_sheet, heat_sheet, mask_sheet, rank_list_sheet

NUM_ROWS = 8  # queries on a rank list, pictures on a mask sheet
NUM_AUGMENTED = 24


def spread(count, wanted):
    """`wanted` positions spread evenly over range(count), or all of it."""
    return torch.linspace(0, count - 1, min(wanted, count)).round().long().tolist()


def draw_augmentations(path, images):
    """Training pictures as the network sees them in the first epoch, with the box (and mask) that followed them."""
    items = [images[1, slot, index] for slot, index in enumerate(spread(len(images), NUM_AUGMENTED))]
    pictures = denormalise(torch.stack([item["image"] for item in items]))  # (N, 3, H, W)
    boxes = torch.stack([item["box"] for item in items]) if images.has_boxes else None  # (N, 4)
    masks = torch.stack([item["mask"] for item in items]) if images.with_masks else None  # (N, 1, H, W)
    augmentation_sheet(path, pictures, boxes, masks)


def draw_rank_list(path, query, gallery, data, metric, num_rows=NUM_ROWS, k=10):
    """Queries spread over the set, each with the k gallery pictures nearest to it that the protocol leaves."""
    chosen = spread(len(query), num_rows)
    junk = junk_mask(labels_of(data.query).at(chosen), labels_of(data.gallery), data.protocol)  # (q, G)
    if data.protocol == "vehicleid":  # the query's own picture is in the gallery
        junk[torch.arange(len(chosen)), chosen] = True
    distances, indices = nearest(query[chosen], gallery, k, metric, junk=junk)  # (q, k), (q, k)
    rows = []
    for number, row_distances, row_indices in zip(chosen, distances.tolist(), indices.tolist(), strict=True):
        sample = data.query[number]
        found = [(data.gallery[i], d) for i, d in zip(row_indices, row_distances, strict=True) if i >= 0]
        rows.append(
            RankRow(
                query_path=sample.path,
                query_name=sample.name or str(sample.id),
                match_paths=[match.path for match, _ in found],
                match_names=[match.name or str(match.id) for match, _ in found],
                distances=[distance for _, distance in found],
                correct=[match.id == sample.id for match, _ in found],
                bits=sample.bits,
            )
        )
    rank_list_sheet(path, rows)


def draw_clusters(path, samples, labels, num_rows=12, num_pictures=12):
    """Clusters spread over those of two pictures or more, the largest first; labels: (N,) of the samples."""
    sizes = labels[labels >= 0].bincount()
    order = sizes.argsort(descending=True, stable=True)[: int((sizes > 1).sum())]
    rows = []
    for label in order[spread(len(order), num_rows)].tolist():
        members = (labels == label).nonzero()[:, 0]
        shown = [samples[i] for i in members[spread(len(members), num_pictures)]]
        rows.append((f"{len(members)} pictures", [(sample.path, sample.bits) for sample in shown]))
    cluster_sheet(path, rows)


@torch.inference_mode()
def draw_masks(path, network, images, device):
    """Predicted masks as heat maps over query pictures."""
    network.eval()
    pictures = torch.stack([images[index]["image"] for index in spread(len(images), NUM_ROWS)])  # (N, 3, H, W)
    masks = network(pictures.to(device), return_mask=True).mask.float().cpu()  # (N, 1, h, w)
    mask_sheet(path, denormalise(pictures), masks)


def draw_activations(path, network, images, device, num_pictures=NUM_ROWS, normalisation=None):
    """Which positions of query pictures make each branch's embedding; beside it the predicted mask, if there is one.

    normalisation: that of `images`, a checkpoint's `mean` and `std`; None for those of training.
    """
    network.eval()
    pictures, layers, names = [], {}, []
    for index in spread(len(images), num_pictures):  # one at a time: any number fits into memory
        picture = images[index]["image"][None]  # (1, 3, H, W)
        sample = images.samples[index]
        pictures.append(picture)
        names.append(sample.name or str(sample.id))
        maps = activation_maps(network, picture.to(device))
        for branch, found in maps.items():
            layers.setdefault(branch if len(maps) > 1 else "activation", []).append(found.cpu())
        if network.mask_decoder is not None:
            with torch.inference_mode():
                mask = network(picture.to(device), return_mask=True).mask  # (1, 1, h, w)
            layers.setdefault("predicted mask", []).append(mask.float().cpu())
    layers = {name: torch.cat(maps) for name, maps in layers.items()}
    pictures = denormalise(torch.cat(pictures), **(normalisation or {}))
    heat_sheet(path, pictures, layers, {"picture": names})


@torch.enable_grad()
def activation_maps(network, pictures):
    """How much each position of a branch's last map makes of its embedding: name -> (B, 1, h, w) in [0, 1].

    With average pooling each position is embedded as if it were the whole picture, and multiplied with the picture's
    embedding (Stylianou et al. 2019, "Visualizing Deep Similarity Networks", equation 3, of a picture with itself): the
    mean of the products is the squared norm of the embedding e. Any other pooling is taken by its gradient: the product
    at p is |e|^2 + h * w * (x_p - mean of x) . d(|e|^2 / 2) / d x_p, which is the same for the average. Products below
    0, which speak for another picture, are 0, and the highest of each picture is 1. The trap: how active the map is
    shows less, for the neck subtracts what all pictures have in common; a network that has learned to leave the
    background out can be most active there. What the weights of a mask leave out is shown as if it counted.
    """
    with torch.no_grad():
        maps = network.activation_maps(pictures)  # name -> (B, C, h, w)
    shown = {}
    for name, x in maps.items():
        x = x.float().requires_grad_()
        embedding = _embedding_of(network, name, x)  # (B, D)
        norm = embedding.square().sum(1)[:, None, None]  # (B, 1, 1)
        (gradient,) = torch.autograd.grad(norm.sum() / 2, x)
        change = x[0, 0].numel() * (gradient * (x - x.mean((2, 3), keepdim=True))).sum(1)  # (B, h, w)
        evidence = (norm + change).detach()[:, None].clamp(min=0)  # (B, 1, h, w)
        shown[name] = evidence / evidence.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return shown


def _embedding_of(network, name, x):
    """What a branch makes of its map (B, C, h, w), its part of the embedding (B, D). Each vector has unit length, as in
    the embedding of a network of several branches; its length is a constant, or no gradient would be left of it."""
    if name not in getattr(network, "branches", {}):
        return network.head(x)[0]
    pooled = network.branches[name].pooled(x)
    if not network.pooled_channels:
        heads = [network.heads[vector] for vector in network.branches[name].names]
        pooled = [head(vector)[network.embed == "after"] for head, vector in zip(heads, pooled, strict=True)]
    return torch.cat([vector / vector.detach().norm(dim=1, keepdim=True).clamp(min=1e-12) for vector in pooled], dim=1)


def draw_embeddings(path, query, gallery, data, metric):
    """The embeddings of query and gallery on the plane of their first two principal components.

    Cosine distance compares directions, so there the unit vectors are drawn.
    """
    one_set = data.gallery == data.query  # VehicleID: each picture once
    features = gallery if one_set else torch.cat([query, gallery])  # (N, D)
    samples = data.gallery if one_set else [*data.query, *data.gallery]
    coordinates, explained = principal_components(F.normalize(features) if metric == "cosine" else features)
    is_query = None if one_set else [number < len(data.query) for number in range(len(samples))]
    names = [sample.name or str(sample.id) for sample in samples]
    title = f"Embeddings of {len(samples):,} pictures of {len(set(names)):,} identities"
    embedding_plot(path, coordinates, names, explained, is_query, title)
