//! A few instructions of x86-64, as bytes: what the built-in guests are made of.

/// A general register, by its number in an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    Rcx = 1,
    Rbx = 3,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
}

impl Register {
    fn low(self) -> u8 {
        self as u8 & 7
    }

    fn high(self) -> u8 {
        self as u8 >> 3
    }
}

/// Code in the making.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    code: Vec<u8>,
}

/// A place in the code to jump back to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Label(usize);

impl Assembler {
    /// Here.
    pub(super) fn label(&self) -> Label {
        Label(self.code.len())
    }

    /// An instruction on a 64-bit register or memory (`rm`) and a register (`reg`).
    fn wide(&mut self, opcode: u8, reg: u8, rm: Register, mode: u8) {
        self.code.extend([0x48 | (reg >> 3) << 2 | rm.high(), opcode, mode << 6 | (reg & 7) << 3 | rm.low()]);
    }

    /// `mov [base + displacement], source`. The base may not be one of rsp and r12, which are encoded otherwise.
    pub(super) fn store(&mut self, base: Register, displacement: i32, source: Register) {
        self.wide(0x89, source as u8, base, 2);
        self.code.extend(displacement.to_le_bytes());
    }

    /// `mov to, from`
    pub(super) fn copy(&mut self, to: Register, from: Register) {
        self.wide(0x89, from as u8, to, 3);
    }

    /// `add to, from`
    pub(super) fn add(&mut self, to: Register, from: Register) {
        self.wide(0x01, from as u8, to, 3);
    }

    /// `inc register`
    pub(super) fn increment(&mut self, register: Register) {
        self.wide(0xff, 0, register, 3);
    }

    /// `cmp left, right`
    pub(super) fn compare(&mut self, left: Register, right: Register) {
        self.wide(0x39, right as u8, left, 3);
    }

    /// `out port, al`
    pub(super) fn out(&mut self, port: u8) {
        self.code.extend([0xe6, port]);
    }

    /// `jb label`, after a comparison.
    pub(super) fn jump_if_below(&mut self, label: Label) {
        self.code.extend([0x0f, 0x82]);
        self.distance(label);
    }

    /// `jmp label`
    pub(super) fn jump(&mut self, label: Label) {
        self.code.push(0xe9);
        self.distance(label);
    }

    fn distance(&mut self, label: Label) {
        let from = self.code.len().saturating_add(4) as i64;
        self.code.extend((label.0 as i64 - from).to_le_bytes().iter().take(4));
    }

    /// The code.
    pub(super) fn finish(self) -> Vec<u8> {
        self.code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against what GNU as makes of the same.
    #[test]
    fn bytes() {
        let mut code = Assembler::default();
        let start = code.label();
        code.store(Register::Rbx, 0xff8, Register::Rcx);
        code.store(Register::R8, 0, Register::R9);
        code.copy(Register::Rbx, Register::Rdi);
        code.add(Register::Rbx, Register::R10);
        code.increment(Register::R9);
        code.compare(Register::Rbx, Register::Rsi);
        code.out(0xe0);
        code.jump_if_below(start);
        code.jump(start);
        let expected = [
            &[0x48, 0x89, 0x8b, 0xf8, 0x0f, 0, 0][..],
            &[0x4d, 0x89, 0x88, 0, 0, 0, 0],
            &[0x48, 0x89, 0xfb],
            &[0x4c, 0x01, 0xd3],
            &[0x49, 0xff, 0xc1],
            &[0x48, 0x39, 0xf3],
            &[0xe6, 0xe0],
            &[0x0f, 0x82, 0xde, 0xff, 0xff, 0xff],
            &[0xe9, 0xd9, 0xff, 0xff, 0xff],
        ]
        .concat();
        assert_eq!(code.finish(), expected);
    }
}
