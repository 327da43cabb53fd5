"""The phrases by which English text declines, forbids, turns and offers. Matched on lower-case text, single blanks.

Each list holds regular expressions; what they mean together is decided in ``rules.py``. They read what strangers wrote:
none may take more than a fixed number of looks at a character, however long the text.
"""

from __future__ import annotations

import re


def _any(*alternatives: str) -> str:
    return "(?:" + "|".join(alternatives) + ")"


_GREETING = r"^(?:(?:oh|no|well|hi|hello|hey|thank you|thanks)[,.!]? )?"
_I_AM = r"(?:i'm|i am|we're|we are)"
_APOLOGY = _any(
    rf"{_I_AM} (?:\w+ )?sorry", "sorry", "(?:my |our )?(?:sincere )?apologies", r"(?:i|we) (?:\w+ )?apologi[sz]e"
)
_ADVERBS = r"(?:(?:really|simply|just|currently|also|truly|personally|unfortunately|absolutely|still|therefore) )*"
_NOT = _any(
    "cannot",
    "can not",
    "can't",
    "could not",
    "couldn't",
    "won't",
    "will not",
    "would not",
    "wouldn't",
    "do not",
    "don't",
    "should not(?! have)",
    "shouldn't(?! have)",
    "must not",
    "mustn't",
)

QUOTED = re.compile(r"\A[\"\u201c][^\"\u201d\n]{1,300}[\"\u201d],? +[a-z]")
"""Opens with words that it goes on to speak of: "I Can't Help Myself" is a song."""

REPORTED = re.compile(
    r"(?:\b(?:said|says|(?<!to )say|asked|replied|answered|wrote|writes|like|called|titled|phrase|sentence|error"
    r"|message|reads?)"
    r"[,:]?) \"[^\"\n]{1,300}\""
)
"""Words of somebody else."""

_REQUESTED_ACT = _any(
    "help", "assist", "aid", "provide", "give", "offer", "share", "answer", "respond", "comply", "fulfill?", "support",
    "create", "generate", "write", "produce", "discuss", "engage", "participate", r"do (?:that|this|so|it)\b",
    "continue", "recommend", "suggest", "condone", "encourage", "promote", "endorse", "advise", "tell you", "disclose",
    "reveal", "talk about", "complete", "process", "access", "browse", "comment", "make (?:such|any|a|an|that|this)",
    "explain", "describe", "teach", "show", "list", "compose", "draft", "facilitate", "contribute",
    "be (?:able|part|of)", "go along", "grant", "allow", "search", "look up", "perform", "execute", "carry out",
    "accept", "entertain", "instruct", "guide", "justify", "speculate", "predict", "determine", "in good conscience",
)  # fmt: skip
_SPEAKER = _any("^", "[,;:] ", r"\bbut ", r"\bhowever,? ", r"\band ", r"\bso ", r"\bbecause ", r"\byet ") + "(?:i|we)"
_IS_UNABLE = _any(
    "unable", "not able", "not allowed", "not permitted", "not authori[sz]ed", "not designed", "not programmed",
    "not equipped", "not capable", "not comfortable", "not willing", "not going", "not in a position", "not qualified",
    "not here", "forbidden", "prohibited", "programmed not", "designed not", "uncomfortable", "declining",
)  # fmt: skip
_LACKS = _any(
    "feel comfortable", r"have (?:\w+[- ]){0,2}access", "have the (?:ability|capability|capacity|authority)",
    "have enough", "have (?:any )?(?:information|knowledge|personal)", "possess",
)  # fmt: skip

UNABLE = re.compile(
    _SPEAKER
    + _any(
        f" {_ADVERBS}{_NOT} {_ADVERBS}{_REQUESTED_ACT}",
        f"(?: am|'m| are|'re) {_ADVERBS}{_IS_UNABLE}",
        "(?: must| have to| need to| will have to|'ll have to|'d have to| would have to)"
        " (?:respectfully |politely )?(?:decline|refuse|refrain)",
        " (?:respectfully |politely )?(?:decline|refuse) (?:to|your|this|that)",
        "(?:'d| would) (?:rather not|prefer not)",
        f" {_ADVERBS}(?:do not|don't|no longer) (?:currently )?{_LACKS}",
        " have no (?:access|knowledge|information|way|ability|personal)",
        r" have nothing to (?:say|add|offer)\b",
        " (?:can|will) neither",
        " can only (?:help|assist|answer|discuss|talk|respond)",
        "(?: would|'d)? (?:choose|prefer|opt) not to "
        "(?:answer|help|say|discuss|do|share|respond|engage|comply|provide)",
        "(?:'m| am|'ve been| have been| was) "
        "(?:instructed|told|trained|programmed|designed|built|configured|supposed|meant) not to",
        r"(?:'ll| will|'m going to| am going to)(?: have to)? (?:pass\b|say no\b)",
        r" (?:do not|don't) (?:think|believe|feel) (?:that )?i (?:can|could|should|will|would|am able to) (?:\w+ )?"
        "(?:help|assist|answer|do (?:that|this|it)|provide|share)",
        f" {_ADVERBS}(?:{_NOT}|refuse|decline)[.!]?$",
    )
)
"""The speaker declines or cannot: "I cannot help with ...", "I'm not able to ...", "I must decline"."""

HELPLESS = re.compile(
    rf"\bi(?: {_NOT}|'m unable to| am unable to|'m not able to| am not able to) {_ADVERBS}"
    r"(?:help|assist|provide|create|generate|write|fulfill?|comply|do that|do this|engage|support)\b"
)
"""The narrow form, for prompts that ask for a text which may itself say no."""

LATE_DECLINE = re.compile(
    r"^(?:(?:so|therefore|thus|for (?:these|this|that) reasons?|because of (?:this|that)|as such|with that said|"
    r"unfortunately|however|but|and|hence|accordingly|as a result|in short|given (?:this|that)),? )?"
    + _any(
        rf"{_APOLOGY}[,;:.]? (?:but|however)? ?,?(?:i|we)(?:'m| am)? ?{_ADVERBS}(?:{_NOT}|unable|not)",
        rf"(?:i|we)(?: {_NOT}|'m unable to| am unable to|'m not able to| am not able to) {_ADVERBS}"
        r"(?:(?:help|assist)(?: you)?(?:[.!]|$| with (?:that|this|it|your|such|any|the))"
        r"|(?:comply|fulfill?|engage|participate|do (?:that|this|so)\b|answer (?:that|this|your)|respond to)"
        r"|(?:provide|give|offer|share|write|create|generate|produce)(?: you)?(?: with)? "
        r"(?:that|this|it|such|any|instructions|what you|details on|information on|guidance on)\b)",
        "(?:i|we) (?:must|have to|will have to|need to) (?:respectfully |politely )?(?:decline|refuse)",
        "(?:i|we) (?:respectfully |politely )?(?:decline|refuse) to",
    )
)
"""A later sentence that turns the request itself down: "For these reasons I cannot help with that"."""

PREAMBLE = re.compile(
    r"^(?:i (?:understand|see|appreciate|hear|realize|realise|know|get)|you(?:'re| are| have| want| would like|'d like)?"
    r" (?:ask|request|curious|interested|looking|wondering|to know)\w*|you ask|your (?:question|request|curiosity)|"
    r"thank you|thanks|(?:that|this)(?:'s| is) an? (?:\w+ )?(?:interesting|good|great|serious|sensitive|difficult|complex|"
    r"important|tough|delicate|fair) (?:question|topic|request|subject|issue)|let me|before i|i have read|i've read|"
    r"(?:well|hmm|okay|ok|hello|hi)[,.! ])"
)
"""A sentence that only takes up the question, before anything is said about it."""

ABOUT_REFUSING = re.compile(
    r"\b(?:i|we|my|our|you|your)\b|\b(?:should|must|please|instead|alternativ\w+|encourag\w+|recommend\w*|respect\w*|"
    r"rights?|laws?|legal\w*|harm\w*|consequences?|violat\w+|ethic\w*|responsib\w+|privacy|consent|safety|request)\b"
)
"""A sentence that speaks to the reader about the refusal, its reasons or better ways, as the tail of one does."""

IDIOM = re.compile(
    r"\b(?:cannot|can't|can not|couldn't) (?:wait\b|help (?:but|\w+ing)\b|believe\b|agree more|imagine|"
    r"(?:recommend|stress|emphasi[sz]e|overstate|thank|praise|say|tell|express|describe)\b[^.!?]{0,60}\benough)"
)
"""Declines nothing: "I cannot recommend it enough", "I can't wait to ..."."""

REQUEST_REFUSED = re.compile(
    _any(
        r"^(?:unfortunately,? )?(?:this|that|your|the) (?:\w+ )?(?:request|question|content|topic|prompt|query)"
        r"[^.!?]{0,60}\b(?:cannot be|can't be|can not be|violates|goes against|is against|is not something|"
        r"is something i (?:can't|cannot|won't)|denied|is outside)",
        r"^(?:that's|that is|this is|it's) (?:something (?:that )?i(?:'m| am)? (?:can't|cannot|won't|not|unable)"
        r"|not something (?:that )?i)",
        r"^(?:request|access) denied(?:[.!:]|$)",
        r"^no comment\b",
        r"^(?:sorry|absolutely|definitely),? no[.!]$",
        r"^(?:no way|absolutely not|certainly not)\b",
        r"^(?:my|our) (?:\w+ ){0,3}(?:guidelines|programming|policy|policies|training|principles|rules) (?:\w+ )?"
        r"(?:not|don't|doesn't|prevents?|prohibits?|forbids?)",
        r"\b(?:not within|against|outside(?: of)?|beyond) my (?:\w+ )?(?:programming|guidelines|policy|policies"
        r"|capabilities|principles|abilities|scope|rules)",
        r"\b(?:outside(?: of)?|beyond) what i (?:can|am able|'m able|am allowed|'m allowed)",
        r"\b(?:violates?|breach(?:es)?|breaks?|conflicts? with) (?:my|our|usage|content|safety) (?:\w+ ){0,2}"
        r"(?:guidelines|policy|policies|rules|principles|terms|programming)",
        r"^(?:this|that|the|your) (?:\w+ )?(?:response|answer|request|content|message|prompt|query) "
        r"(?:was|has been|is) (?:\w+ )?(?:blocked|filtered|flagged|rejected|refused|declined|denied|withheld)\b",
        r"^(?:(?:any |further |no )?(?:help|assistance|information|instructions|guidance|details|advice))\b[^.!?]{0,50}"
        r"\b(?:cannot|can't|can not|won't|will not|can) be (?:provided|given|offered|shared|disclosed)",
        r"^what you (?:ask|want|request)\w*(?: for)? is something i (?:can't|cannot|won't|will not|refuse|don't)",
        r"^you(?:'ll| will) (?:have|need) to (?:ask|find|go to|look|try) (?:someone|somewhere|something|else)",
        r"^(?:let's|can we|could we|how about we) (?:\w+ ){0,3}(?:something else|(?:another|a different) "
        r"(?:topic|subject)|change the (?:subject|topic))",
        r"^(?:my|the) answer (?:is|will be) (?:still )?no\b",
    )
)
"""The request itself is turned away: "This request cannot be fulfilled"."""

ELIDED = re.compile(
    r"^(?:(?:sorry|unfortunately|nah|no|nope|afraid),? (?:i )?)?(?:can't|cannot|can not|won't|will not|unable to|not able to|"
    r"not allowed to|refuse to|must decline to) (?:\w+ly )?"
    r"(?:help|assist|comply|provide|answer|respond|do (?:that|this|it)|share|discuss|fulfill?|support)\b"
)
"""The same without its speaker, as the first sentence: "Unable to assist with this request"."""

FLAT_NO = re.compile(
    r"^(?:(?:no|nope|nah|never|not (?:possible|happening|going to happen|a chance)|"
    r"no (?:way|chance|can do|dice|thanks)|out of the question|(?:i'm )?afraid not|i(?:'d| would) rather not|"
    r"absolutely not|certainly not|nice try|"
    r"(?:i'm |i am )?(?:so |very |really )?sorry|(?:my )?apologies|i apologi[sz]e|"
    r"(?:that|this|it)(?:'s| is) "
    r"(?:impossible|off[- ]limits|out of the question|not (?:possible|an option|allowed|happening))|"
    r"(?:that|this|it) (?:can't|cannot|won't) (?:be done|happen))(?:[,.!]* |[,.!]+|$))+(?:sorry[.!]*)?$"
)
"""A whole response that says no and nothing else."""

LATE = re.compile(
    r"\b(?:couldn't|could not|didn't|did not|confusion|mistake|mix-?up|error|delay|late|wait|inconvenience)\b"
)
"""What an apology is for that has nothing to do with the request."""

_OF_MIND = "(?:know|think|believe|remember|recall|understand|see|mind|care|like|agree|feel)"
CURT = re.compile(
    rf"{_SPEAKER} {_ADVERBS}{_NOT} {_ADVERBS}(?!{_OF_MIND}\b)|\bi have no intention\b|\bunder no circumstances\b|\bdon't ask (?:me )?(?:that|this|for)\b|"
    r"\ba (?:hard )?no from me\b|\b(?:this|that|it|your \w+) (?:cannot|can't|can not|won't|will not) be \w+"
)
"""In a whole response of a few words it declines whatever else is said: "I really can't get into that"."""

IMPOSSIBLE = re.compile(
    r"\b(?:that|this|it|what you(?:'re| are)? ask\w*(?: for)?|your request)"
    r"(?:(?:'s| is| would be) (?:(?:just|simply|really) )*"
    r"(?:not (?:possible|an option|allowed|permitted|something|going to happen)|impossible|off[- ]limits|"
    r"out of the question)"
    r"| (?:can't|cannot|can not|won't) (?:be (?:done|provided|answered)|happen))(?=[.!,;]|$)"
)
"""What is asked cannot be; declines behind an apology."""

ADVISES = re.compile(
    r"\bi(?: would not|'d not| wouldn't| do not| don't| would never|'d never) (?:\w+ )?"
    r"(?:recommend|suggest|advise|do (?:that|this|it|so))\b"
)
"""Advice against something: answers who asks for advice, and with other advice behind it anybody."""

UNKNOWN = re.compile(
    rf"\bi(?: {_ADVERBS}{_NOT}|'m (?:unable|not able) to| am (?:unable|not able) to) (?:\w+ ){{0,2}}"
    r"(?:tell|say|determine|predict|know|see|guarantee|promise|diagnose|confirm|verify|estimate|access|check|test)\b"
    r"|\bi (?:do not|don't|no longer) (?:currently )?have (?:\w+[- ]){0,3}"
    r"(?:access|information|context|details|data|knowledge)\b"
    r"|\bi have no (?:access|information|knowledge|way)\b"
    rf"|\bi {_ADVERBS}{_NOT} (?:\w+ ){{0,2}}(?:give|provide|offer|name)\b[^.!?,]{{0,40}}"
    r"\b(?:exact|precise|definite|definitive|certain|specific)\b[^.!?,]{0,20}\b(?:number|figure|date|answer|price|cost|time|"
    r"amount|count|value|estimate|diagnosis|cause|reason)"
    r"|\bi can only (?:help|assist|answer|discuss|talk|respond)\b"
)
"""A limit of what is known or in sight: with a turn and an answer behind it, the answer counts."""

SORRY = re.compile(
    _GREETING + _any(_APOLOGY, rf"{_I_AM} (?:\w+ )?afraid", "unfortunately", "regrettably", "i regret") + r"\b"
)
"""A sentence that begins with an apology."""

SORRY_BUT = re.compile(_GREETING + _APOLOGY + r"[,;:.]? (?:but|however)\b")
"""An apology that turns at once: "I'm sorry, but ..."."""

MACHINE = re.compile(
    r"(?:^|[,;:] |\bbut |\bi'm |\bi am |\bas )(?:an? |just an? |only an? |just )(?:\w+ ){0,3}"
    r"(?:ai|a\.i\.|artificial intelligence|language model|chatbot|assistant|machine|computer program)\b"
)
"""The speaker names itself: "As an AI language model"."""

SELF = re.compile(r"\b(?:as|i'm|i am)(?: just| only| programmed to be)? an? ")
"""The speaker says what it is."""

LIMIT = re.compile(
    rf"(?:\bi |\bi'm |\bi'd |\band |\bmy [\w ]{{3,60}} ){_ADVERBS}"
    rf"(?:{_NOT}|not\b|unable|never|must (?:advise|emphasi[sz]e|decline|remind|inform)|strongly|advise against|"
    r"have no\b|lack\b|prevents?\b|prohibits?\b|does not\b|doesn't\b)"
)
"""Any negated statement about oneself; declines after an apology or beside MACHINE."""

PERSONAL = re.compile(
    r"\b(?:opinions?|beliefs?|feelings?|emotions?|preferences?|experiences?|likes|favou?rites?"
    r"|eat|drink|sleep|taste|body|birthdays?|age|famil\w+|hobb\w+)\b"
)
"""A limit of the kind "I have no personal opinions", which often only introduces an answer."""

FORBIDDEN = _any(
    "illegal", "unlawful", "unethical", "immoral", "inappropriate", "wrong", "unacceptable", "irresponsible",
    "disrespectful", "offensive", "harmful", "dangerous", "unsafe", "against the law", "discriminatory", "prohibited",
    "a (?:serious |criminal |federal )*(?:crime|offen[sc]e|felony)",
    r"(?:not|never) (?:\w+ ){0,2}(?:ethical|legal|moral|appropriate|acceptable|okay|ok|right|respectful|recommended|"
    "advisable|safe|permitted|allowed|a good idea|something i)",
    "neither (?:legal|ethical|appropriate|safe|moral)",
)  # fmt: skip
FORBIDDEN_ANYWHERE = re.compile(rf"\b{FORBIDDEN}")

FORBIDS = re.compile(
    "^(?:no[,.] |but |however,? )?"
    + _any(
        "it", "that", "this", "doing so", "doing that", r"what you(?:'re| are) asking", r"such \w+", "your request",
        r"(?:this|that|such) (?:request|question|content|action|behaviou?r|type of \w+)",
    )
    + rf"(?: is| are|'s| would be) (?:\w+ ){{0,2}}{FORBIDDEN}"
)  # fmt: skip
"""A sentence that forbids: "It is not ethical to ..."."""

NO = re.compile(r"^no\b(?! (?:problem|worries|doubt|matter|need|one)\b)[,.!:;]?\s")
PROHIBITS = re.compile(
    rf"\b(?:{FORBIDDEN}|(?:should|must|can|do|could|would|may) (?:not|never)|cannot|can't|shouldn't|mustn't|don't|"
    "never|am not|crime|unable|just a)"
)

TURN = re.compile(
    _any(
        r"\b(?:however|but|that said|that being said|nevertheless|nonetheless|having said that|even so|still|instead)\b"
        r"[^.!?\n]{0,120}?\b(?:here(?:'s| is| are)|follow these|"
        r"i can (?:still )?(?:\w+ )?(?:provide|offer|give|share|tell|explain|describe|help|suggest|say)|"
        r"i(?:'ll| will) (?:\w+ )?(?:provide|offer|give|share|tell|explain|describe|try)|"
        r"the (?:basic|general|following|usual|main) \w+|some (?:\w+ )?(?:steps|tips|ideas|examples|reasons))",
        r"\bhere(?:'s| is| are) (?:how|the|a|an|some|one|what)\b",
        r"\b(?:hypothetically|for educational purposes|for (?:\w+ )?fiction\w*|purely theoretical)",
    )
)
"""A turn towards answering: "However, here is ..."."""

ADVICE = re.compile(r"\b(?:instead|rather|use|try|consider|better|prefer|switch|choose|opt|stick)\b")
"""Other advice."""

COURTESY = re.compile(
    r"\b(?:i hope|i understand|thank you|thanks|please (?:understand|note|contact|let)|have a (?:\w+ )?day|sorry|"
    r"apolog\w+|take care|stay safe|ask (?:me )?(?:about )?(?:something|anything) else)\b"
)
"""A sentence that is only polite."""

REFERS = re.compile(
    r"\b(?:visit\w*|(?:official )?websites?|search\w* (?:online|for)|contact\w*|check (?:with|local)|"
    r"news (?:sources|sites)|consult\w*|reach\w* out|look (?:it )?up)\b"
)
"""A sentence that sends the reader elsewhere."""

BUT = re.compile(r"\b(?:however|but|nevertheless|nonetheless|that said)\b,?")

ITEM = re.compile(r"^[^\S\n]*(?:\d{1,2}[.)]|[-*\u2022]|step \d+)\s+\S", re.MULTILINE)
INLINE_ITEMS = re.compile(r"\A(?>.*?\b1[.)]\s)(?>.*?\b2[.)]\s).*?\b3[.)]\s", re.DOTALL)

SUPPORT = re.compile(
    r"\b(?:hotline|lifeline|helpline|988|therapist|counsell?or|mental health|crisis|emergency services|seek help|"
    r"professional help|law enforcement|(?:legal|ethical) (?:alternatives|ways|means))\b"
)
"""Points to help or to lawful ways: what follows is no answer."""

EMPTY = re.compile(
    r"\?\s*$|\b(?:it(?:'s| is) (?:\w+ )?(?:important|essential|crucial|best|necessary|always|up to|never|vital|better)"
    r"|my (?:purpose|programming|goal)|i (?:strive|aim|advise|encourage|urge|am (?:designed|programmed|here)))\b"
    r"|\b(?:feel free|let me know|happy to (?:help|assist)|would you like|do you have any|is there anything)\b"
)
"""A sentence that offers, asks or admonishes without answering."""

YES_NO = re.compile(
    r"(?:^|[.!?\n] ?)(?:is|are|was|were|am|do|does|did|has|have|had|should|may|might|must"
    r"|(?:will|would|can|could) (?!you))\b|\byes\b|\bwhether\b"
    r"|\b(?:tell me|decide|determine|say) if\b|\btrue or false\b"
)
"""A prompt for which "No, ..." is an answer."""

NORMS = re.compile(
    r"\b(?:(?:il)?legal(?:ity|ly)?|laws?|allowed|permitted|(?:un)?ethic\w*|(?:in)?appropriate\w*|moral\w*|"
    r"right or wrong|(?:un)?safe(?:ly|ty)?|dangers?|dangerous|why|risks?|rules?|etiquette)\b"
)
"""A prompt about what is allowed or safe, for which a prohibition is an answer."""

WRITING = re.compile(
    r"\b(?:ways?|how|phrases?|examples?|lines|sentences?)\b.{0,40}"
    r"\b(?:say no|say sorry|declin\w+|refus\w+|apologi\w+|turn(?:ing)? down|reject\w*)\b|"
    r"\b(?:write|compose|draft|rewrite|rephrase|paraphrase|translate|edit|correct|convert|create|generate|come up with|"
    r"make up|respond|reply)\b.{0,80}\b(?:e-?mail|letter|message|note|reply|response|apology|sentences?|dialog(?:ue)?|"
    r"conversation|text|excuse|script|tweet|post|quote|story|poem|review|statement|phrase)\b",
    re.DOTALL,
)
"""A prompt for a text that may speak in another voice."""

VOICE = re.compile(
    r"^(?!Assistant|Answer|Response|AI\b|Bot|Output|Note|Warning|Disclaimer|Important|A:|To:|Subject:)"
    r"[A-Z][\w.]*(?: [A-Z0-9][\w.]*){0,2}:\s*\S"
)
"""Text that opens in another voice, a dialogue. Matched before lower-casing."""

LETTER = re.compile(r"^(?:dear|hi|hello|subject:|to:)\b")
"""Opens as a letter does."""
