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


@torch.inference_mode()
def draw_activations(path, network, images, device, num_pictures=NUM_ROWS, normalisation=None):
    """Which positions of query pictures make their embedding; beside it the predicted mask, if there is one.

    normalisation: that of `images`, a checkpoint's `mean` and `std`; None for those of training.
    """
    network.eval()
    pictures, layers, names = [], {}, []
    for index in spread(len(images), num_pictures):  # one at a time: any number fits into memory
        picture = images[index]["image"][None]  # (1, 3, H, W)
        sample = images.samples[index]
        pictures.append(picture)
        names.append(sample.name or str(sample.id))
        layers.setdefault("activation", []).append(activation_map(network, picture.to(device)).cpu())
        if network.mask_decoder is not None:
            mask = network(picture.to(device), return_mask=True).mask  # (1, 1, h, w)
            layers.setdefault("predicted mask", []).append(mask.float().cpu())
    layers = {name: torch.cat(maps) for name, maps in layers.items()}
    pictures = denormalise(torch.cat(pictures), **(normalisation or {}))
    heat_sheet(path, pictures, layers, {"picture": names})


def activation_map(network, pictures):
    """How much each position of the last stage makes of the embedding: (B, 3, H, W) -> (B, 1, h, w) in [0, 1].

    Each position is embedded as if it were the whole picture, and multiplied with the picture's embedding (Stylianou et
    al. 2019, "Visualizing Deep Similarity Networks", equation 3, of a picture with itself): with average pooling the
    mean of the products is the squared norm of the embedding. Those below 0, which speak for another picture, are 0,
    and the highest of each picture is 1. The trap: how active the stage is shows less, for the neck subtracts what all
    pictures have in common; a network that has learned to leave the background out can be most active there. What the
    weights of a mask leave out is shown as if it counted.
    """
    *_, stage = network.backbone.forward_stages(pictures)  # (B, C, h, w)
    count, _, height, width = stage.shape
    positions = stage.float().permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  # (B * h * w, C, 1, 1)
    parts = network.head(positions)[0].reshape(count, height, width, -1)  # (B, h, w, D)
    whole = network.head(stage.float())[0]  # (B, D)
    evidence = torch.einsum("bhwd,bd->bhw", parts, whole)[:, None].clamp(min=0)  # (B, 1, h, w)
    return evidence / evidence.amax((2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


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
