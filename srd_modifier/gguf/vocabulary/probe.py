"""Texts on which tokenizers differ."""

from collections.abc import Iterator, Sequence

from srd_modifier.gguf.vocabulary.tokens import AddedToken

TEXTS = (
    "",
    " ",
    "Hello world",
    " Hello world",
    "  two  spaces   three    four",
    "trailing ",
    "trailing   ",
    "\t",
    "\tone\t\ttwo \t three",
    "\n",
    "\n\n",
    "\n\n\n\n\n",
    "line\nline\n\nline\r\nline\r\n\r\nline\rline",
    " \n  \n\t\n x \n",
    "end of line   \n   start of line",
    "0 1 12 123 1234 12345 123456 1234567 12345678901234567890",
    "3.14159, 1,234,567.89; 1e-5 0x1F 10% $100 #42 -7 +8",
    "a1b22c333d4444",
    "it's I'll we've you're he'd I'm don't IT'S I'LL WE'VE YOU'RE HE'D I'M DON'T 's 'll",
    "l'été d\u2019accord rock 'n' roll '' \"quoted\" \u201cquoted\u201d 'quoted'",
    "camelCase PascalCase HTTPServer snake_case SCREAMING_CASE kebab-case iPhone McDonald",
    "Hello, world! What?! No... (yes) [no] {maybe} <tag/> a/b\\c @user #tag &c. ~/x",
    "!hello ?who .dot -dash _underscore *star /slash $cash +plus =eq |pipe `tick",
    "!!!???...---===***///\\\\\\###$$$%%%^^^&&&+++<<<>>>|||~~~```",
    "word!\nword.\n\nword;\r\n/\n//\n",
    "for (int i = 0; i < n; ++i) {\n    sum += a[i] * 2;\n}\n",
    'def f(x: int) -> str:\n\treturn f"{x!r:>10}"  # comment\n\n\nclass A:\n    pass\n',
    "https://example.org/path?q=1&r=two#three user@example.org",
    "\u00fcber stra\u00dfe \u00c0\u00c9\u00ce\u00d5\u00dc \u00e6\u00f8\u00e5",
    "\u0142\u00f3d\u017a \u01c4ungla \u00ba\u00aa",
    "e\u0301 n\u0303 a\u030a o\u0308 \u1e9b\u0323 q\u0307\u0323",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u039a\u0391\u039b\u0397",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6c49\u5b57\u548ckana\u304b\u306a\u30ab\u30bf\u30ab\u30ca\u3001123\u5e74",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4! \u3131\u3134",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0661\u0662\u0663",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0938\u094d\u0935\u093e\u0917\u0924 \u0928\u092e\u0938\u094d\u0924\u0947 \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e51\u0e52\u0e53",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea \u2764\ufe0f \u263a",
    "\u00b2\u00b3\u00bd \u2167 \u2460 \u20ac\u00a3\u00a5 \u2264\u2260\u221e \u2192 \u00a9\u2122 \u2026\u2014\u2013",
    "\u00a0nbsp\u00a0\u3000ideographic\u3000\u2003em\u2003\u200bzero\u200b",
    "\x01\x1f\x7f\x0b\x0c",
    "\u2581\u2581under\u2581line",
    "<0x0A> [PAD] <unk",
)


def probe(texts: Sequence[str], added: Sequence[AddedToken], known: Sequence[str]) -> Iterator[str]:
    """Texts to try a vocabulary on.

    Args:
        texts: Texts of its own tokens, some of them.
        added: Its added tokens; some are put into texts, and all of those that take spaces along.
        known: Texts of the added tokens with a meaning.
    """
    yield from TEXTS
    for start in range(0, len(texts), 8):
        part = texts[start : start + 8]
        yield "".join(part)
        yield " ".join(part)
        yield from part
    for token in [*added[:8], *added[-8:]]:
        yield f"a{token.text}b {token.text} c{token.text}{token.text}"
    for token in added:
        if token.strips or token.text in known:
            yield f"{token.text} one  {token.text}  two\n{token.text}\nthree {token.text}"
