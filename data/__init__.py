"""Referring data as Hugging Face datasets. A row is one referred object: `image`, `mask`, `sentences`, `ref_id`,
`ann_id`, `image_id`, `category`, `bbox`; `records.py` defines them."""
