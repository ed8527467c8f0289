"""The page's server in this process, and the question that its tests ask."""

QUESTION = {
    "model": "Qwen2.5-0.5B", "gpu": "H100-SXM", "gpus": "8", "steps": "50", "windows": "1000",
    "prompts_per_step": "32", "samples_per_prompt": "4", "max_response_tokens": "3000", "draws": "300",
}  # fmt: skip
LAW = {"mean_tokens": "900"}
PORT = 8123
HERE = f"http://127.0.0.1:{PORT}"


def asked(page, what="answer", **changes):
    return page.get(f"/api/{what}", params={**QUESTION, **LAW, **changes})


def faults(response):
    found = response.json()["faults"]
    assert all(len(fault["message"].splitlines()) == 1 for fault in found)
    return {fault["field"]: fault["message"] for fault in found}


def words(query):
    return [word for name, value in query.items() for word in (f"--{name.replace('_', '-')}", value)]
