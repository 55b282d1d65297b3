"""What the real Hub refuses in a card's metadata, as far as this project writes any."""

from __future__ import annotations


def card_errors(data: object) -> list[str]:
    """One sentence for each thing that is wrong; empty when all is well."""
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = [
        f'"{key}" must be a string' for key in ("library_name", "pipeline_tag", "license")
        if key in data and not isinstance(data[key], str)
    ]  # fmt: skip
    for key in ("tags", "datasets", "metrics", "language"):
        value = data.get(key, [])
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            errors.append(f'"{key}" must be a string or a list of strings')
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for part, needed in (("task", ["type"]), ("dataset", ["type", "name"])):
                errors += [
                    f'"model-index results {part}.{key}" is required'
                    for key in needed
                    if not result.get(part, {}).get(key)
                ]
            errors += ["a metric needs type and value" for m in result["metrics"] if len(m) < 2]
    return errors
