"""The schemas by which Kubernetes and JobSet take manifests, from packages that publish them."""

import copy
from typing import Any

import jsonschema
import kubernetes_validate
from kubeflow_trainer_api import models


def jobset_schema() -> dict[str, Any]:
    """JSON schema of a JobSet as generated from its CRD, with the Job and Pod templates of Kubernetes; unknown keys are
    errors, as in the API server's strict validation."""
    schema = models.JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    for one in (schema, *schema["$defs"].values()):
        if one.get("type") == "object" and "properties" in one:
            one["additionalProperties"] = False
    for name in schema["$defs"]:
        if name.endswith(
            ("Quantity", "IntOrString")
        ):  # classes of their own there, "x-kubernetes-int-or-string" in the CRD
            schema["$defs"][name] = {"type": ["string", "integer"]}
    return schema


def errors(manifest: dict[str, Any]) -> list[str]:
    """What the schemas refuse of a JobSet: the whole by JobSet's, the Job in it by Kubernetes's own."""
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(jobset_schema()).iter_errors(manifest))
    told = [] if error is None else [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    for replicated in manifest["spec"].get("replicatedJobs", ()):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}} | copy.deepcopy(
            replicated["template"]
        )
        try:
            kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            told.append(str(error.message))
    return told
