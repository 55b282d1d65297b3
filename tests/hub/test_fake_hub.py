"""The fake Hub works with the client of huggingface_hub and returns the uploaded bytes."""

from __future__ import annotations

from tests.hub.fake_hub import FakeHub

ROUND_TRIP = """
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, snapshot_download
api = HfApi()
assert api.whoami()["name"] == "tiny-user"
repo = api.create_repo("round", private=True)
assert repo.repo_id == "tiny-user/round", repo.repo_id
assert api.create_repo("round", exist_ok=True).repo_id == repo.repo_id
folder = Path("folder"); (folder / "sub").mkdir(parents=True)
(folder / "README.md").write_text("---\\ntags:\\n- a\\n---\\n\\n# hello\\n")
(folder / "sub" / "weights.bin").write_bytes(bytes(range(256)) * 999)
api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message="both")
assert api.list_repo_files(repo.repo_id) == ["README.md", "sub/weights.bin"]
back = Path(snapshot_download(repo.repo_id))
assert (back / "sub" / "weights.bin").read_bytes() == bytes(range(256)) * 999
assert ModelCard.load(repo.repo_id).data.tags == ["a"]
print("done")
"""

REFUSED = """
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
api = HfApi()
def refused(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as seen:
        return print(type(seen).__name__)
    raise SystemExit("not refused")
refused(HfHubHTTPError, api.create_repo, "x", token="hf_wrong")
api.create_repo("x")
refused(EntryNotFoundError, api.hf_hub_download, "tiny-user/x", "nothing.txt")
refused(RepositoryNotFoundError, api.hf_hub_download, "tiny-user/y", "nothing.txt")
refused(ValueError, api.upload_file, repo_id="tiny-user/x", path_in_repo="README.md",
        path_or_fileobj=b"---\\nlicense: [1]\\n---\\n")
"""


def test_files_come_back(hub: FakeHub, run_with_hub) -> None:
    assert run_with_hub(ROUND_TRIP).strip() == "done"
    repo = hub.repos["tiny-user/round"]
    assert repo.private
    assert repo.commits[-1] == ("main", "both", ("README.md", "sub/weights.bin"))


def test_the_hub_rejects_invalid_requests(run_with_hub) -> None:
    assert len(run_with_hub(REFUSED).splitlines()) == 4
