"""`pocketllm generate`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketllm.cli.option_groups import LoadOptions, RunOptions, with_groups
from pocketllm.cli.render import Output
from pocketllm.cli.shared_options import Runnable, Seed
from pocketllm.errors import ConfigError

if TYPE_CHECKING:
    from pocketllm.evaluate import Sampling

app = typer.Typer()


@app.command(
    epilog='Examples:\n\n  pocketllm generate smol-8x --prompt "The capital of France is"\n\n'
    "  pocketllm generate my-chat-model --chat --temperature 0.7 --top-p 0.9\n\n"
    '  pocketllm generate smol-8x --prompt "Rome is" --prompt "Paris is" --json'
)
@with_groups
def generate(
    model: Runnable,
    *,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; several are batched. Without it, stdin is read."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens to generate.")] = 40,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template; without --prompt, each line is a message.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many tokens; 0 takes all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among tokens of this total probability.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Smallest probability relative to the likeliest token.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that have occurred less likely.")
    ] = 1.0,
    seed: Seed = 0,
    how: LoadOptions,
    run: RunOptions,
) -> None:
    """Generate text with a compressed or dense model; the text appears as it is generated."""
    from pocketllm.evaluate import Sampling

    show = run.output()
    run.setup()
    if system is not None and not chat:
        raise ConfigError("--system: is a message of a chat; add --chat")
    conversing = chat and not prompt
    if conversing and run.json:
        raise ConfigError("--json: a conversation has no single result; add --prompt")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    prompts = prompt or ([] if conversing else [sys.stdin.read()])
    if any(not text.strip() for text in prompts):
        raise ConfigError("prompt: is empty; give some text to continue")
    loaded, tokenizer, facts = how.load(model, run)
    job = _Run(loaded, tokenizer, max_new_tokens, sampling, _system_turn(system), show)
    if conversing:
        job.converse()
    elif len(prompts) == 1:
        job.one(prompts[0], chat, {**facts, "model": model})
    else:
        job.batch(prompts, chat, {**facts, "model": model})


def _system_turn(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A loaded model and how it is to generate. opening: the first messages of every chat."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    sampling: Sampling
    opening: list[dict[str, str]]
    show: Output

    def one(self, prompt: str, chat: bool, facts: dict[str, Any]) -> None:
        """Continue a prompt."""
        asked = self._messages(prompt) if chat else prompt
        done = self._generate(asked, shown_first="" if chat else prompt)
        self.show.result({**dataclasses.asdict(done), **facts})

    def batch(self, prompts: Sequence[str], chat: bool, facts: dict[str, Any]) -> None:
        """Continue several prompts at once."""
        from pocketllm.evaluate import generate_batch

        asked: list[Any] = [self._messages(prompt) if chat else prompt for prompt in prompts]
        done = generate_batch(self.model, self.tokenizer, asked, self.max_new_tokens, self.sampling)
        values = {"generations": [dataclasses.asdict(each) for each in done], **facts}
        self.show.result(values, *(f"{each.continuation if chat else each.text}\n" for each in done))
        self._note_speed(sum(each.tokens for each in done), done[0].tokens_per_second)

    def converse(self) -> None:
        """Answer each line of stdin, with all that was said before in view."""
        messages = list(self.opening)
        self.show.note("Type a message; an empty line or the end of the input ends the chat.")
        while True:
            self.show.ask("> ")
            said = sys.stdin.readline().strip()
            if not said:
                return
            messages.append({"role": "user", "content": said})
            done = self._generate(messages)
            messages.append({"role": "assistant", "content": done.continuation})

    def _messages(self, prompt: str) -> list[dict[str, str]]:
        return [*self.opening, {"role": "user", "content": prompt}]

    def _generate(self, prompt: Any, shown_first: str = "") -> Any:
        """Print the continuation as it comes, unless the result is JSON."""
        from pocketllm import generate as run_model

        pieces: list[str] = []

        def on_text(text: str) -> None:
            self.show.stream(text if pieces else shown_first + text)
            pieces.append(text)

        shown = None if self.show.as_json else on_text
        done = run_model(
            self.model, self.tokenizer, prompt, self.max_new_tokens, self.sampling, on_text=shown
        )
        if shown is not None:
            shown("\n")
        self._note_speed(done.tokens, done.tokens_per_second)
        return done

    def _note_speed(self, tokens: int, speed: float) -> None:
        self.show.note(f"{tokens} tokens, {speed:.1f} tokens per second")
