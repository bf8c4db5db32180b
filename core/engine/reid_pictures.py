"""The picture sheets of a ReID run: what the network is shown, whom it finds, and where it sees the object."""

import torch

from core import visualize
from core.data.transforms import denormalise
from core.engine.reid import labels
from core.retrieval.distance import nearest
from core.retrieval.ranking import junk_mask

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
    visualize.augmentation_sheet(path, pictures, boxes, masks)


def draw_rank_list(path, query, gallery, data, protocol, metric, num_rows=NUM_ROWS, k=10):
    """Queries spread over the set, each with the k gallery pictures nearest to it that the protocol leaves."""
    chosen = spread(len(query), num_rows)
    query_ids, query_cameras = (label[chosen] for label in labels(data.query))
    gallery_ids, gallery_cameras = labels(data.gallery)
    junk = junk_mask(query_ids, gallery_ids, query_cameras, gallery_cameras, protocol)  # (q, G)
    if protocol == "vehicleid":  # the query's own picture is in the gallery
        junk[torch.arange(len(chosen)), chosen] = True
    distances, indices = nearest(query[chosen], gallery, k, metric, junk=junk)  # (q, k), (q, k)
    rows = []
    for number, row_distances, row_indices in zip(chosen, distances.tolist(), indices.tolist(), strict=True):
        sample = data.query[number]
        found = [(data.gallery[i], d) for i, d in zip(row_indices, row_distances, strict=True) if i >= 0]
        rows.append(
            visualize.RankRow(
                query_path=sample.path,
                query_name=sample.name or str(sample.id),
                match_paths=[match.path for match, _ in found],
                match_names=[match.name or str(match.id) for match, _ in found],
                distances=[distance for _, distance in found],
                correct=[match.id == sample.id for match, _ in found],
            )
        )
    visualize.rank_list_sheet(path, rows)


@torch.inference_mode()
def draw_masks(path, network, images, device):
    """Predicted masks as heat maps over query pictures."""
    network.eval()
    pictures = torch.stack([images[index]["image"] for index in spread(len(images), NUM_ROWS)])  # (N, 3, H, W)
    masks = network(pictures.to(device), return_mask=True).mask.float().cpu()  # (N, 1, h, w)
    visualize.mask_sheet(path, denormalise(pictures), masks)
