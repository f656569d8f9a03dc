"""Quality and cost: PQ and AP per image and per dataset, mIoU, exits taken, tokens kept."""
